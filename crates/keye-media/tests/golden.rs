//! Golden tests: the crate from outside, against the fixtures and against `ffmpeg` itself.

#[path = "golden/make.rs"]
mod make;
#[path = "golden/support.rs"]
mod support;

#[path = "golden/broken.rs"]
mod broken;
#[path = "golden/clips.rs"]
mod clips;
#[path = "golden/stills.rs"]
mod stills;
#[path = "golden/video.rs"]
mod video;
