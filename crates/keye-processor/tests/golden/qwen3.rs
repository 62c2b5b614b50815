//! Speed and exactness with a vocabulary of real size. Set `KEYE_QWEN3_TOKENIZER` to a directory with Qwen3's tokenizer.json.
//!
//! `KEYE_QWEN3_IDS` may name a json file of rows `{"text", "ids"}` made by another implementation; the ids have to agree.

use std::path::PathBuf;
use std::time::Instant;

use keye_processor::Tokenizer;
use serde_json::Value;

#[test]
#[ignore = "needs a downloaded tokenizer; see the module's comment"]
fn real_vocabulary() {
    let dir = PathBuf::from(std::env::var_os("KEYE_QWEN3_TOKENIZER").expect("KEYE_QWEN3_TOKENIZER names a directory"));
    let start = Instant::now();
    let tokenizer = Tokenizer::load(&dir).unwrap();
    println!("load: {:?}, {} ids", start.elapsed(), tokenizer.vocab_size());

    if let Some(path) = std::env::var_os("KEYE_QWEN3_IDS") {
        let rows: Value = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
        let mut tokens = 0;
        for row in rows.as_array().unwrap() {
            let ids: Vec<u32> = serde_json::from_value(row["ids"].clone()).unwrap();
            assert_eq!(tokenizer.encode(row["text"].as_str().unwrap()).unwrap(), ids, "{row}");
            assert_eq!(tokenizer.decode(&ids, false).unwrap(), row["decoded"].as_str().unwrap(), "{row}");
            tokens += ids.len();
        }
        println!("{} texts, {tokens} tokens agree", rows.as_array().unwrap().len());
    }

    // Hostile lengths: one long word, a desert of spaces, many special tokens. Time has to stay near linear.
    for (name, text) in [
        ("one word", "a".repeat(1 << 20)),
        ("spaces", format!("{}x", " ".repeat(1 << 18))),
        ("newlines", format!("{}x", "\n ".repeat(1 << 17))),
        ("special", "<|image_pad|>".repeat(60_000)),
        ("prose", "The quick brown fox jumps over the lazy dog, 你好世界. ".repeat(20_000)),
    ] {
        let start = Instant::now();
        let ids = tokenizer.encode(&text).unwrap();
        println!("{name}: {} bytes, {} tokens in {:?}", text.len(), ids.len(), start.elapsed());
        let start = Instant::now();
        assert_eq!(tokenizer.decode(&ids, false).unwrap(), text);
        println!("  decoded in {:?}", start.elapsed());
    }
}
