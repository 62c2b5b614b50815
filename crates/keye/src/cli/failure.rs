//! Errors to messages and exit codes.

use std::process::ExitCode;

use keye::{ArgumentError, AskError, EngineError, LoadError, MediaError};
use keye_backend::BackendError;
use keye_engine::Fault;
use keye_model::ModelError;
use keye_processor::ProcessorError;

/// The command line is wrong in a way that its parser cannot see.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct Usage(pub String);

/// Ctrl-C.
#[derive(Debug, thiserror::Error)]
#[error("interrupted")]
pub struct Interrupted;

/// Nobody reads standard output any more, as with `keye ... | head`.
#[derive(Debug, thiserror::Error)]
#[error("standard output is closed")]
pub struct OutputClosed;

const FAILED: u8 = 1;
const USAGE: u8 = 2;
const MODEL: u8 = 3;
const MEDIA: u8 = 4;
const INTERRUPTED: u8 = 130;

/// Prints the error and tells the exit code.
pub fn report(error: &anyhow::Error) -> ExitCode {
    if error.is::<OutputClosed>() {
        return ExitCode::SUCCESS;
    }
    let code = exit_code(error);
    if code != INTERRUPTED {
        super::ui::error_line(&message(error));
    }
    ExitCode::from(code)
}

/// The error and its causes. Causes that the text before them has already are left out.
pub fn message(error: &anyhow::Error) -> String {
    without_repetition(&format!("{error:#}")).to_owned()
}

/// Cuts ends like `: io: refused` off that stand twice.
fn without_repetition(text: &str) -> &str {
    let repeated = text.rmatch_indices(": ").find(|(at, _)| text[..*at].ends_with(&text[*at..]));
    repeated.map_or(text, |(at, _)| without_repetition(&text[..at]))
}

fn exit_code(error: &anyhow::Error) -> u8 {
    let code = |error: &(dyn std::error::Error + 'static)| {
        if error.is::<Usage>() {
            return Some(USAGE);
        }
        if error.is::<Interrupted>() {
            return Some(INTERRUPTED);
        }
        if let Some(error) = error.downcast_ref::<ProcessorError>() {
            return of_fault(Fault::from(error));
        }
        if let Some(error) = error.downcast_ref::<LoadError>() {
            return Some(of_load(error));
        }
        if let Some(error) = error.downcast_ref::<MediaError>() {
            return Some(of_media(error));
        }
        if let Some(error) = error.downcast_ref::<ArgumentError>() {
            return Some(of_argument(error));
        }
        match (error.downcast_ref::<AskError>(), error.downcast_ref::<EngineError>()) {
            (Some(AskError::Argument(error)), _) => Some(of_argument(error)),
            (Some(AskError::Engine(error)), _) | (_, Some(error)) => of_engine(error),
            _ => None,
        }
    };
    error.chain().find_map(code).unwrap_or(FAILED)
}

/// What a flag or variable asks for, and this model or build does not do, is wrong usage: without it the model is loaded.
fn of_load(error: &LoadError) -> u8 {
    match error {
        LoadError::Setting(_)
        | LoadError::Backend(BackendError::Setting(_))
        | LoadError::Model(ModelError::Ranks(_))
        | LoadError::Checkpoint(ProcessorError::Attention { .. }) => USAGE,
        _ => MODEL,
    }
}

/// `None` for what is neither the command line's fault nor that of the media.
fn of_fault(fault: Fault) -> Option<u8> {
    match fault {
        Fault::Request => Some(USAGE),
        Fault::Media => Some(MEDIA),
        Fault::Cancelled => Some(INTERRUPTED),
        Fault::Busy | Fault::Stopped | Fault::Machine => None,
    }
}

/// Media that the machine cannot read, for want of a decoder or of room, are media that cannot be read.
fn of_media(error: &MediaError) -> u8 {
    of_fault(Fault::from(error)).unwrap_or(MEDIA)
}

fn of_argument(error: &ArgumentError) -> u8 {
    match error {
        ArgumentError::Media(error) => of_media(error),
        _ => USAGE,
    }
}

fn of_engine(error: &EngineError) -> Option<u8> {
    match error {
        EngineError::Media(medium) => Some(of_media(&medium.error)),
        error => of_fault(error.fault()),
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;

    #[test]
    fn what_the_user_can_change_is_usage() {
        let code = |error: EngineError| exit_code(&error.into());
        assert_eq!(code(EngineError::ContextLength { tokens: 9, max: 8 }), USAGE);
        assert_eq!(code(EngineError::Grammar("no".into())), USAGE);
        assert_eq!(code(EngineError::Internal("no".into())), FAILED);
        assert_eq!(code(ProcessorError::Template("no".into()).into()), USAGE);
        assert_eq!(code(ProcessorError::File { path: "x".into(), reason: "no".into() }.into()), FAILED);
        let load = |error: LoadError| exit_code(&error.into());
        assert_eq!(load(ModelError::Ranks("no".into()).into()), USAGE);
        assert_eq!(load(BackendError::Setting("no".into()).into()), USAGE);
        assert_eq!(load(BackendError::Memory { what: "x".into(), bytes: 1, remedy: "y" }.into()), MODEL);
        assert_eq!(load(LoadError::Length("no".into())), MODEL);
        let media = |error| code(keye_engine::MediumError { index: 1, of: 2, error: Arc::new(error) }.into());
        assert_eq!(media(MediaError::Option { input: "x".into(), option: "fps", reason: "no".into() }), USAGE);
        assert_eq!(media(MediaError::Unreadable { input: "x".into(), reason: "no".into() }), MEDIA);
        assert_eq!(media(MediaError::Ffmpeg("no".into())), MEDIA);
    }

    #[test]
    fn causes_are_told_once() {
        for (text, expected) in [
            ("x.mp4: cannot read: gone (os error 2): gone (os error 2)", "x.mp4: cannot read: gone (os error 2)"),
            ("u: cannot read: io: refused: io: refused", "u: cannot read: io: refused"),
            ("cannot read x: gone: gone: gone", "cannot read x: gone"),
            ("a: b", "a: b"),
            ("r.json: messages[0]: missing", "r.json: messages[0]: missing"),
        ] {
            assert_eq!(without_repetition(text), expected);
        }
    }
}
