//! Messages of any content through the published chat template: an error, or text.
#![no_main]
use std::sync::LazyLock;

use keye_processor::{ChatTemplate, TemplateOptions};
use serde_json::Value;

static TEMPLATE: LazyLock<ChatTemplate> = LazyLock::new(|| {
    let file: Value =
        serde_json::from_slice(include_bytes!("../../fixtures/keye-1_5-tiny/model/chat_template.json")).unwrap();
    // Panics inside the template engine are caught and become errors; only one that gets out is a finding.
    std::panic::set_hook(Box::new(|_| {}));
    ChatTemplate::new(file["chat_template"].as_str().unwrap().to_owned()).unwrap()
});

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    LazyLock::force(&TEMPLATE);
    // Either the data are messages, or they are the template itself.
    match serde_json::from_slice::<Vec<Value>>(data) {
        Ok(messages) => {
            let _ = TEMPLATE.render(&messages, &TemplateOptions::default());
        }
        Err(_) => {
            let Ok(source) = std::str::from_utf8(data) else { return };
            if let Ok(template) = ChatTemplate::new(source.to_owned()) {
                let messages = [serde_json::json!({"role": "user", "content": "Hi"})];
                let _ = template.render(&messages, &TemplateOptions::default());
            }
        }
    }
});
