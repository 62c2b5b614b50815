//! Chat messages of any content: an error that says where, or a conversation.
#![no_main]
use keye_processor::{Conversation, ThinkMode};

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    let Ok(value) = serde_json::from_slice(data) else { return };
    match Conversation::from_json(&value) {
        Ok(conversation) => {
            let _ = conversation.with_think(ThinkMode::Think);
        }
        Err(error) => assert!(!error.to_string().is_empty()),
    }
});
