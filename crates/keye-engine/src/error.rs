//! Why a request fails, and whose fault that is.

use std::fmt;
use std::io::ErrorKind;
use std::sync::Arc;

use keye_media::MediaError;
use keye_model::ModelError;
use keye_processor::ProcessorError;

/// Why a request failed. All answers to one request get the same.
#[derive(Debug, Clone, thiserror::Error)]
#[non_exhaustive]
pub enum EngineError {
    /// One of its media.
    #[error(transparent)]
    Media(#[from] MediumError),
    /// Its messages or prompt.
    #[error(transparent)]
    Processor(Arc<ProcessorError>),
    /// The model.
    #[error(transparent)]
    Model(Arc<ModelError>),
    /// As many requests wait as may; try again later.
    #[error("{0} requests are waiting, no more are taken; try again later")]
    QueueFull(usize),
    /// It cannot be run with these limits.
    #[error("{0}")]
    Refused(String),
    /// The prompt is too long, or leaves no room for an answer.
    #[error(
        "the prompt has {tokens} tokens, prompt and answer (if any) may have {max} together; shorten it, or give its media \
         fewer frames or pixels"
    )]
    ContextLength {
        /// Tokens of the prompt.
        tokens: usize,
        /// Most tokens of prompt and answer together.
        max: usize,
    },
    /// A grammar that cannot be compiled, or that no answer can satisfy.
    #[error("grammar: {0}")]
    Grammar(String),
    /// Compiling other grammars takes so long that they were given up, and it still goes on; try again later.
    #[error("{0} grammars that took too long are still being compiled, no more are begun; try again later")]
    GrammarsBusy(usize),
    /// The caller gave up.
    #[error("cancelled")]
    Cancelled,
    /// A defect: a panic, or an answer of the model that breaks its contract. Only this request is lost.
    #[error("internal error: {0}")]
    Internal(String),
    /// The engine is shutting down or its thread is gone.
    #[error("the engine has stopped")]
    Stopped,
}

/// What is wrong with one of a request's media. The text says which, where there are several.
#[derive(Debug, Clone)]
pub struct MediumError {
    /// Its number, from 0, in the order of the conversation.
    pub index: usize,
    /// How many there are.
    pub of: usize,
    /// What is wrong.
    pub error: Arc<MediaError>,
}

impl MediumError {
    /// `medium 2 of 3: `, or nothing where there is one.
    pub fn place(index: usize, of: usize) -> String {
        if of > 1 { format!("medium {} of {of}: ", index + 1) } else { String::new() }
    }
}

impl fmt::Display for MediumError {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        write!(f, "{}{}", Self::place(self.index, self.of), self.error)
    }
}

impl std::error::Error for MediumError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        self.error.source()
    }
}

impl From<ProcessorError> for EngineError {
    fn from(error: ProcessorError) -> Self {
        Self::Processor(Arc::new(error))
    }
}

impl From<ModelError> for EngineError {
    fn from(error: ModelError) -> Self {
        Self::Model(Arc::new(error))
    }
}

/// Whose fault a failure is: what a server makes a status of, and a program an exit code.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// The request's: its messages, options or form cannot be, or are too much.
    Request,
    /// That of media which it names: not there, damaged, too large, not allowed.
    Media,
    /// Nobody's: there is no room now.
    Busy,
    /// The caller gave up.
    Cancelled,
    /// The engine stops.
    Stopped,
    /// The machine's or ours: a full disk, a broken decoder or checkpoint, a defect. The text may name what is no business
    /// of strangers.
    Machine,
}

impl EngineError {
    /// Whose fault it is.
    pub fn fault(&self) -> Fault {
        match self {
            Self::Media(medium) => Fault::from(&*medium.error),
            Self::Processor(error) => Fault::from(&**error),
            Self::Refused(_) | Self::ContextLength { .. } | Self::Grammar(_) => Fault::Request,
            Self::QueueFull(_) | Self::GrammarsBusy(_) => Fault::Busy,
            Self::Cancelled => Fault::Cancelled,
            Self::Stopped => Fault::Stopped,
            Self::Model(_) | Self::Internal(_) => Fault::Machine,
        }
    }
}

impl From<&MediaError> for Fault {
    fn from(error: &MediaError) -> Self {
        match error {
            MediaError::Option { .. } => Self::Request,
            MediaError::Read { source, .. } => match source.kind() {
                ErrorKind::StorageFull | ErrorKind::OutOfMemory => Self::Machine,
                _ => Self::Media,
            },
            MediaError::Denied { .. } | MediaError::Limit { .. } | MediaError::Unreadable { .. } => Self::Media,
            MediaError::Busy { .. } => Self::Busy,
            MediaError::Cancelled => Self::Cancelled,
            // Temporary files, decoders.
            _ => Self::Machine,
        }
    }
}

impl From<&ProcessorError> for Fault {
    fn from(error: &ProcessorError) -> Self {
        match error {
            ProcessorError::Messages { .. }
            | ProcessorError::Template(_)
            | ProcessorError::Prompt(_)
            | ProcessorError::Attention { .. } => Self::Request,
            // Files of the checkpoint.
            _ => Self::Machine,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::error::Error;

    use super::*;

    #[test]
    fn an_error_says_which_medium_it_is_about_when_there_are_several() {
        let gone = || MediaError::Read { input: "x.png".into(), source: ErrorKind::NotFound.into() };
        let text = |index, of| EngineError::from(MediumError { index, of, error: Arc::new(gone()) }).to_string();
        assert_eq!(text(0, 1), gone().to_string());
        assert_eq!(text(1, 3), format!("medium 2 of 3: {}", gone()));
        let error = EngineError::from(MediumError { index: 0, of: 2, error: Arc::new(gone()) });
        let cause = error.source().map(ToString::to_string);
        assert_eq!(cause, gone().source().map(ToString::to_string), "the cause is told once");
    }

    #[test]
    fn faults() {
        let read = |kind: ErrorKind| Fault::from(&MediaError::Read { input: "x".into(), source: kind.into() });
        assert_eq!((read(ErrorKind::NotFound), read(ErrorKind::StorageFull)), (Fault::Media, Fault::Machine));
        let option = MediaError::Option { input: "x".into(), option: "fps", reason: "y".into() };
        assert_eq!(Fault::from(&option), Fault::Request);
        assert_eq!(Fault::from(&MediaError::Ffmpeg("x".into())), Fault::Machine);
        assert_eq!(Fault::from(&MediaError::Busy { input: "x".into(), reason: "y".into() }), Fault::Busy);
        let file = ProcessorError::File { path: "x".into(), reason: "y".into() };
        assert_eq!(EngineError::from(file).fault(), Fault::Machine);
        assert_eq!(EngineError::from(ProcessorError::Prompt("x".into())).fault(), Fault::Request);
        assert_eq!(EngineError::from(ModelError::Media("x".into())).fault(), Fault::Machine);
        assert_eq!(EngineError::GrammarsBusy(3).fault(), Fault::Busy);
    }
}
