//! Any text to ids and back, at once and streamed; any ids to text.
#![no_main]
use std::path::Path;
use std::sync::LazyLock;

use keye_processor::Tokenizer;

static TOKENIZER: LazyLock<Tokenizer> = LazyLock::new(|| {
    Tokenizer::load(&Path::new(env!("CARGO_MANIFEST_DIR")).join("../fixtures/keye-1_5-tiny/model")).unwrap()
});

fn streamed(ids: &[u32], skip_special: bool) -> String {
    let mut stream = TOKENIZER.stream(skip_special);
    let mut text: String = ids.iter().map(|id| stream.push(*id).unwrap()).collect();
    text.push_str(&stream.finish());
    text
}

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    if let Ok(text) = std::str::from_utf8(data) {
        let ids = TOKENIZER.encode(text).unwrap();
        assert_eq!(streamed(&ids, false), TOKENIZER.decode(&ids, false).unwrap());
    }
    let size = TOKENIZER.vocab_size() as u32;
    let ids: Vec<u32> = data.chunks_exact(2).map(|b| u32::from(u16::from_le_bytes([b[0], b[1]])) % size).collect();
    for skip_special in [false, true] {
        assert_eq!(streamed(&ids, skip_special), TOKENIZER.decode(&ids, skip_special).unwrap());
    }
});
