//! config.json of any content: an error, or sizes that nothing downstream can overflow on.
#![no_main]
use std::path::Path;

use keye_processor::ModelConfig;

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    let Ok(value) = serde_json::from_slice(data) else { return };
    if let Ok(config) = ModelConfig::from_value(Path::new("config.json"), &value) {
        let text = &config.text;
        assert_eq!(text.mrope_section.iter().sum::<usize>(), text.head_dim / 2);
        assert_eq!(text.num_attention_heads % text.num_key_value_heads, 0);
        assert!(text.vocab_size.checked_mul(text.hidden_size).is_some());
        assert!(config.vision.image_size >= config.vision.patch_size);
    }
});
