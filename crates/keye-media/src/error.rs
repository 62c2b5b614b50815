//! What can go wrong with media.

/// A refusal or failure that names the input, what was expected and found, and where there is one the remedy.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum MediaError {
    /// The source could not be opened or read.
    #[error("{input}: cannot read: {source}")]
    Read {
        /// The path or URL.
        input: String,
        /// Why.
        source: std::io::Error,
    },
    /// What the caller may not open: remote media without consent, a path outside the media root.
    #[error("{input}: not allowed: {reason}")]
    Denied {
        /// The path or URL.
        input: String,
        /// The rule and the flag that lifts it.
        reason: String,
    },
    /// Not a picture or clip that can be read.
    #[error("{input}: {reason}")]
    Unreadable {
        /// The path, the URL, or how many bytes of data there were.
        input: String,
        /// What was found.
        reason: String,
    },
    /// An option that is wrong, or that this variant does not take.
    #[error("{input}: option {option}: {reason}")]
    Option {
        /// The path, the URL, or how many bytes of data there were.
        input: String,
        /// The option's name.
        option: &'static str,
        /// Expected and found.
        reason: String,
    },
    /// Above one of [`crate::Limits`].
    #[error("{input}: {what} is {found}, the limit is {limit}{}", remedy(what))]
    Limit {
        /// The path, the URL, or how many bytes of data there were.
        input: String,
        /// What was measured.
        what: &'static str,
        /// How much there is.
        found: u64,
        /// How much may be.
        limit: u64,
    },
    /// The folder for temporary files is full or cannot be written to.
    #[error("temporary files in {}: {error}; make room there, or let TMPDIR name another folder", folder.display())]
    Temporary {
        /// `$TMPDIR`, or what the system has for it.
        folder: std::path::PathBuf,
        /// Why.
        error: std::io::Error,
    },
    /// Too much is being done at this moment; nothing is known to be wrong with the source.
    #[error("{input}: not fetched: {reason}; try again later")]
    Busy {
        /// The URL.
        input: String,
        /// What there is too much of.
        reason: String,
    },
    /// `ffmpeg` or `ffprobe` is missing or failed.
    #[error("{0}")]
    Ffmpeg(String),
    /// The caller gave up.
    #[error("cancelled")]
    Cancelled,
}

impl MediaError {
    /// The same about a frame of a list, told by its place in it.
    pub(crate) fn of_frame(mut self, index: usize) -> Self {
        match &mut self {
            Self::Read { input, .. }
            | Self::Denied { input, .. }
            | Self::Unreadable { input, .. }
            | Self::Option { input, .. }
            | Self::Limit { input, .. }
            | Self::Busy { input, .. } => *input = format!("frame {index} ({input})"),
            Self::Temporary { .. } | Self::Ffmpeg(_) | Self::Cancelled => {}
        }
        self
    }
}

/// What brings an item within a limit.
fn remedy(what: &str) -> &'static str {
    match what {
        "the number of bytes" => "; give a smaller file, or serve with a higher --max-media-size",
        "the number of frames" => "; give a shorter clip or fewer frames",
        "the number of sampled frames" => "; sample fewer by fps, nframes or max_frames",
        "the number of pixels" | "the number of pixels of a frame" => "; scale it down first",
        "the number of patches" | "the number of patches after resizing" => {
            "; lower min_pixels or max_pixels, and for clips fps, nframes or max_frames"
        }
        "the time in seconds" => "; give a shorter or smaller clip, or serve with a higher --media-timeout",
        _ => "",
    }
}

/// An option or clip that cannot be served, before the input's name is known.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Refusal {
    /// The option's name.
    pub option: &'static str,
    /// Expected and found.
    pub reason: String,
}

impl Refusal {
    pub(crate) fn new(option: &'static str, reason: impl Into<String>) -> Self {
        Self { option, reason: reason.into() }
    }

    /// The error for the input of that name.
    pub(crate) fn of(self, input: &str) -> MediaError {
        MediaError::Option { input: input.to_owned(), option: self.option, reason: self.reason }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_limit_tells_what_to_do() {
        let text = |what| MediaError::Limit { input: "a.mp4".into(), what, found: 9, limit: 8 }.to_string();
        assert_eq!(
            text("the number of sampled frames"),
            "a.mp4: the number of sampled frames is 9, the limit is 8; sample fewer by fps, nframes or max_frames"
        );
        assert!(text("the time in seconds").ends_with("serve with a higher --media-timeout"));
    }
}
