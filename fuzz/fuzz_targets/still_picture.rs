//! A picture of any bytes: an error, or patches within the limits.
#![no_main]
use std::sync::Once;

use keye_media::{ItemOptions, Limits, Loader, MediaConfig, MediaItem, MediaKind, Source};

static QUIET: Once = Once::new();

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    // Panics inside the decoders are caught and become errors; only one that gets out is a finding.
    QUIET.call_once(|| std::panic::set_hook(Box::new(|_| {})));
    let mut loader = Loader::new(MediaConfig::preview());
    loader.limits = Limits { patches: 2_000, source_pixels: 1 << 20, ..Limits::default() };
    loader.config.image.max_pixels = 100_352;
    let item =
        MediaItem { kind: MediaKind::Image, source: Source::Bytes(data.into()), options: ItemOptions::default() };
    if let Ok(media) = loader.load(&item, &mut |_| true) {
        assert!(!media.patches.is_empty() && media.patches.len() as u64 <= loader.limits.patches);
    }
});
