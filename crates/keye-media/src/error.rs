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
        /// The path, URL or "data".
        input: String,
        /// What was found.
        reason: String,
    },
    /// An option that is wrong, or that this variant does not take.
    #[error("{input}: option {option}: {reason}")]
    Option {
        /// The path, URL or "data".
        input: String,
        /// The option's name.
        option: &'static str,
        /// Expected and found.
        reason: String,
    },
    /// Above one of [`crate::Limits`].
    #[error("{input}: {what} is {found}, the limit is {limit}")]
    Limit {
        /// The path, URL or "data".
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
    /// `ffmpeg` or `ffprobe` is missing or failed.
    #[error("{0}")]
    Ffmpeg(String),
    /// The caller gave up.
    #[error("cancelled")]
    Cancelled,
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
