//! What an operator decides.

use std::net::{IpAddr, Ipv4Addr};
use std::path::{Path, PathBuf};
use std::time::Duration;

use keye_media::{Access, ItemOptions, Limits, Loader, MediaConfig, MediaItem, RemotePolicy, Source};

use crate::error::ApiError;
use crate::tls::TlsFiles;

/// Settings of a server. The defaults serve one machine's own users.
#[derive(Debug, Clone)]
pub struct ServerConfig {
    /// Address to listen on.
    pub host: IpAddr,
    /// Port; 0 lets the system choose.
    pub port: u16,
    /// Speak TLS with this identity; `None` is plain HTTP.
    pub tls: Option<TlsFiles>,
    /// Name of the model in answers and in `/v1/models`.
    pub model: String,
    /// Clients have to send one of these as a bearer token; empty lets everyone in.
    pub api_keys: Vec<String>,
    /// Origins of web pages that may call, as `https://example.org`; `*` is all.
    pub cors_origins: Vec<String>,
    /// Largest request body in bytes; data URLs are in it.
    pub body_bytes: usize,
    /// Bytes of all bodies that are held at the same time.
    pub total_body_bytes: usize,
    /// Connections at the same time; more wait to be accepted.
    pub max_connections: usize,
    /// Choices that are generated or wait at the same time; more are answered 429.
    pub max_streams: usize,
    /// Longest time for a body to arrive.
    pub body_timeout: Duration,
    /// A streaming client that takes nothing for this long is cut off.
    pub reader_timeout: Duration,
    /// Between signs of life in a stream whose tokens are not there yet.
    pub keep_alive: Duration,
    /// After being told to stop: time for open streams to finish.
    pub shutdown_timeout: Duration,
    /// Collector of OpenTelemetry traces, like `http://localhost:4318`.
    #[cfg(feature = "otel")]
    pub otlp_endpoint: Option<String>,
    /// Media that requests may name.
    pub media: MediaAccess,
    /// Largest values of request options.
    pub ceilings: Ceilings,
}

impl Default for ServerConfig {
    fn default() -> Self {
        Self {
            host: IpAddr::V4(Ipv4Addr::LOCALHOST),
            port: 8000,
            tls: None,
            model: "keye".into(),
            api_keys: Vec::new(),
            cors_origins: Vec::new(),
            body_bytes: 256 << 20,
            total_body_bytes: 1 << 30,
            max_connections: 1024,
            max_streams: 64,
            body_timeout: Duration::from_secs(300),
            reader_timeout: Duration::from_secs(60),
            keep_alive: Duration::from_secs(10),
            shutdown_timeout: Duration::from_secs(30),
            #[cfg(feature = "otel")]
            otlp_endpoint: None,
            media: MediaAccess::default(),
            ceilings: Ceilings::default(),
        }
    }
}

/// What requests may name besides the bytes that they carry.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct MediaAccess {
    /// Directory whose files may be named, as `file://` or as paths in it; `None` refuses all files.
    pub path: Option<PathBuf>,
    /// `http(s)://` sources, under this policy; `None` refuses all.
    pub remote: Option<RemotePolicy>,
}

impl MediaAccess {
    /// The same, for the loader that opens them.
    pub fn access(&self) -> Access {
        Access {
            remote: self.remote.is_some(),
            remote_policy: self.remote.clone(),
            root: self.path.clone(),
            confine: true,
            no_files: self.path.is_none(),
        }
    }

    /// What may be sent, as it is set.
    fn allowed(&self) -> String {
        let mut ways = vec!["the bytes as a base64 data URL (data:video/mp4;base64,...)"];
        if self.path.is_some() {
            ways.push("a file:// URL or a path inside of the server's media path");
        }
        if self.remote.is_some() {
            ways.push("an http:// or https:// URL");
        }
        match ways.split_last() {
            Some((last, first)) if !first.is_empty() => format!("{} or {last}", first.join(", ")),
            _ => ways.concat(),
        }
    }

    /// Refuses what the loader would refuse, before the request waits for its turn, and names the flag.
    pub(crate) fn check(&self, item: &MediaItem) -> Result<(), ApiError> {
        let refused = |reason: &str| Err(ApiError::media(&format!("{reason}; send {}", self.allowed())));
        match &item.source {
            Source::Path(path) if path.as_os_str().is_empty() => {
                let message = format!("the address of the medium is empty; send {}", self.allowed());
                Err(ApiError { code: Some("media_unreadable"), ..ApiError::media(&message) })
            }
            Source::Path(path) => match scheme(path) {
                Some(scheme) => refused(&format!("{scheme}:// is no kind of address that is opened")),
                None if self.path.is_none() => refused("files are off on this server (--media-path)"),
                None => Ok(()),
            },
            Source::Url(_) if self.remote.is_none() => {
                refused("http and https are off on this server (--allow-remote-media)")
            }
            Source::Frames(frames) => frames.iter().try_for_each(|frame| {
                self.check(&MediaItem {
                    kind: item.kind,
                    source: frame.source.clone(),
                    options: ItemOptions::default(),
                })
            }),
            _ => Ok(()),
        }
    }
}

/// The scheme of a URL that was taken for a path: `ftp`, `s3`, `rtsp`.
fn scheme(path: &Path) -> Option<&str> {
    let (scheme, _) = path.to_str()?.split_once("://")?;
    let letters = |c: char| c.is_ascii_alphanumeric() || "+-.".contains(c);
    (scheme.starts_with(|c: char| c.is_ascii_alphabetic()) && scheme.chars().all(letters)).then_some(scheme)
}

/// Largest values of what a request may ask for. Options above are refused with the ceiling named, since an answer about
/// other frames than were asked for would be wrong without saying so; `max_tokens` is lowered, which `finish_reason` tells.
#[derive(Debug, Clone, PartialEq)]
pub struct Ceilings {
    /// Frames per second of `fps`.
    pub fps: f64,
    /// Frames of a clip: `nframes`, `max_frames`, `min_frames`, and what sampling gives.
    pub frames: u32,
    /// Pixels of a picture or frame: `max_pixels`, `min_pixels`, `resized_height * resized_width`.
    pub pixels: u64,
    /// Pixels of a whole clip: `total_pixels`, `video_total_pixels`.
    pub total_pixels: u64,
    /// Images and clips of one request.
    pub media: usize,
    /// Generated tokens; `None` leaves it to the longest sequence of the engine.
    pub max_tokens: Option<usize>,
    /// Choices of one request.
    pub choices: usize,
    /// Bytes of one source.
    pub media_bytes: u64,
    /// Pixels of a picture or frame as it comes: its memory while it is decoded, up to 16 bytes each.
    pub source_pixels: u64,
    /// Time to fetch and decode one item.
    pub media_time: Duration,
}

impl Default for Ceilings {
    fn default() -> Self {
        Self {
            fps: 30.0,
            frames: 2048,
            pixels: 16_384 * 784,
            total_pixels: 131_072 * 784,
            media: 64,
            max_tokens: None,
            choices: 16,
            media_bytes: 2 << 30,
            source_pixels: 64 << 20,
            media_time: Duration::from_secs(600),
        }
    }
}

impl Ceilings {
    /// Sets the loader's limits, and lowers the variant's defaults, so that a request without options stays below the ceilings.
    pub fn apply(&self, loader: &mut Loader) {
        let (bytes, source_pixels, frames, time) = (self.media_bytes, self.source_pixels, self.frames, self.media_time);
        loader.limits = Limits { bytes, source_pixels, frames, time, ..Limits::default() };
        let MediaConfig { image, video, processor } = &mut loader.config;
        let sizes = [
            (&mut image.min_pixels, &mut image.max_pixels),
            (&mut video.min_pixels, &mut video.max_pixels),
            (&mut processor.min_pixels, &mut processor.max_pixels),
        ];
        for (min, max) in sizes {
            *max = (*max).min(self.pixels);
            *min = (*min).min(*max);
        }
        video.fps = video.fps.min(self.fps);
        video.max_frames = video.max_frames.min(self.frames);
        video.min_frames = video.min_frames.min(video.max_frames);
        video.total_pixels = video.total_pixels.min(self.total_pixels);
    }

    pub(crate) fn check(&self, options: &ItemOptions) -> Result<(), ApiError> {
        let whole = |name, value: Option<u64>, ceiling: u64| match value {
            Some(value) if value > ceiling => Err(above(name, value, ceiling)),
            _ => Ok(()),
        };
        let number = |name, value: Option<f64>, ceiling: f64| match value {
            Some(value) if value > ceiling => Err(above(name, value, ceiling)),
            _ => Ok(()),
        };
        let frames = u64::from(self.frames);
        number("fps", options.fps, self.fps)?;
        number("nframes", options.nframes, frames as f64)?;
        whole("max_frames", options.max_frames.map(u64::from), frames)?;
        whole("min_frames", options.min_frames.map(u64::from), frames)?;
        whole("max_pixels", options.max_pixels, self.pixels)?;
        whole("min_pixels", options.min_pixels, self.pixels)?;
        let resized = options.resized_height.map(u64::from).zip(options.resized_width.map(u64::from));
        whole("resized_height * resized_width", resized.map(|(height, width)| height * width), self.pixels)?;
        whole("total_pixels", options.total_pixels, self.total_pixels)?;
        whole("video_total_pixels", options.video_total_pixels, self.total_pixels)
    }
}

fn above(name: &str, value: impl std::fmt::Display, ceiling: impl std::fmt::Display) -> ApiError {
    ApiError::invalid(name, format!("{name} is {value}, this server allows up to {ceiling}"))
}

#[cfg(test)]
mod tests {
    use keye_media::MediaKind;

    use super::*;

    #[test]
    fn a_refused_address_hears_what_is_allowed_here() {
        let none = MediaAccess::default();
        let files = MediaAccess { path: Some("/srv".into()), remote: None };
        let remote = MediaAccess { path: None, remote: Some(RemotePolicy::default()) };
        let both = MediaAccess { path: Some("/srv".into()), ..remote.clone() };
        let data = "send the bytes as a base64 data URL (data:video/mp4;base64,...)";
        let inside = "a file:// URL or a path inside of the server's media path";
        let http = "an http:// or https:// URL";
        let off = "files are off on this server (--media-path); ";
        let remote_off = "http and https are off on this server (--allow-remote-media); ";
        let unknown = "ftp:// is no kind of address that is opened; ";
        let empty = "the address of the medium is empty; ";
        for (access, url, said) in [
            (&none, "a.mp4", format!("{off}{data}")),
            (&none, "file:///a.mp4", format!("{off}{data}")),
            (&none, "https://x/a.mp4", format!("{remote_off}{data}")),
            (&none, "ftp://x/a.mp4", format!("{unknown}{data}")),
            (&none, "", format!("{empty}{data}")),
            (&files, "http://x/a.mp4", format!("{remote_off}{data} or {inside}")),
            (&files, "ftp://x/a.mp4", format!("{unknown}{data} or {inside}")),
            (&remote, "a.mp4", format!("{off}{data} or {http}")),
            (&both, "ftp://x/a.mp4", format!("{unknown}{data}, {inside} or {http}")),
            (&both, "", format!("{empty}{data}, {inside} or {http}")),
        ] {
            let source = Source::parse(url).unwrap();
            let item = MediaItem { kind: MediaKind::Video, source, options: ItemOptions::default() };
            let error = access.check(&item).unwrap_err();
            assert_eq!((error.message, error.status.as_u16()), (said, 400), "{url}");
            let code = if url.is_empty() { "media_unreadable" } else { "media_not_allowed" };
            assert_eq!(error.code, Some(code), "{url}");
            let item = MediaItem {
                source: Source::Frames(vec![keye_media::FrameItem { source: item.source, options: None }]),
                ..item
            };
            assert!(access.check(&item).is_err(), "a frame of a list");
        }
    }

    #[test]
    fn options_above_a_ceiling_are_refused_by_name() {
        let ceilings = Ceilings { fps: 4.0, frames: 10, pixels: 1000, total_pixels: 5000, ..Ceilings::default() };
        type Set = fn(&mut ItemOptions);
        let below = ItemOptions { fps: Some(4.0), max_frames: Some(10), max_pixels: Some(1000), ..Default::default() };
        assert_eq!(ceilings.check(&below), Ok(()));
        let cases: [(&str, Set); 9] = [
            ("fps", |o| o.fps = Some(4.1)),
            ("nframes", |o| o.nframes = Some(11.0)),
            ("max_frames", |o| o.max_frames = Some(11)),
            ("min_frames", |o| o.min_frames = Some(11)),
            ("max_pixels", |o| o.max_pixels = Some(1001)),
            ("min_pixels", |o| o.min_pixels = Some(1001)),
            ("resized_height * resized_width", |o| {
                (o.resized_height, o.resized_width) = (Some(u32::MAX), Some(u32::MAX))
            }),
            ("total_pixels", |o| o.total_pixels = Some(5001)),
            ("video_total_pixels", |o| o.video_total_pixels = Some(5001)),
        ];
        for (name, set) in cases {
            let mut options = ItemOptions::default();
            set(&mut options);
            assert_eq!(ceilings.check(&options).unwrap_err().param.as_deref(), Some(name));
        }
    }
}
