//! A media string of any content: path, file URL, web URL or data URL, or an error.
#![no_main]
use keye_media::Source;

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    let Ok(text) = std::str::from_utf8(data) else { return };
    if let Ok(Source::Bytes(bytes)) = Source::parse(text) {
        assert!(bytes.len() <= text.len());
    }
    // The same bytes behind a data URL's header reach the decoder every time.
    let _ = Source::parse(&format!("data:image/png;base64,{text}"));
});
