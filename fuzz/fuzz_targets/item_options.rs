//! Options of any content on a small picture and on a list of frames: an error, or patches within the limits.
#![no_main]
use std::sync::{Arc, LazyLock};

use keye_media::{FrameItem, ItemOptions, Limits, Loader, MediaConfig, MediaItem, MediaKind, Source};

static PICTURE: LazyLock<Arc<[u8]>> = LazyLock::new(|| include_bytes!("../../fixtures/keye-1_5-tiny/inputs/host/b_small.png")[..].into());

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    let Some((mode, json)) = data.split_first() else { return };
    let Ok(options) = serde_json::from_slice::<ItemOptions>(json) else { return };
    let config = if mode & 1 == 0 { MediaConfig::preview() } else { MediaConfig::slow_fast() };
    let mut loader = Loader::new(config);
    loader.limits = Limits { patches: 2_000, source_pixels: 1 << 20, frames: 16, ..Limits::default() };
    let picture = Source::Bytes(PICTURE.clone());
    let item = if mode & 2 == 0 {
        MediaItem { kind: MediaKind::Image, source: picture, options }
    } else {
        let frame = FrameItem { source: picture, options: None };
        MediaItem { kind: MediaKind::Video, source: Source::Frames(vec![frame; 3]), options }
    };
    if let Ok(media) = loader.load(&item, &mut |_| true) {
        assert!(!media.patches.is_empty() && media.patches.len() as u64 <= loader.limits.patches);
    }
});
