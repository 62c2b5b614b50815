//! keye-nano, the model inside the program: its files as they stand in the repository's `models/keye-nano`.

use keye_processor::EmbeddedFiles;

/// A file in the program's image, aligned as in a memory map.
#[repr(C, align(64))]
struct Aligned<T: ?Sized>(T);

static WEIGHTS: &Aligned<[u8]> = &Aligned(*include_bytes!("../../../models/keye-nano/model.safetensors"));

macro_rules! text {
    ($name:literal) => {
        ($name, include_bytes!(concat!("../../../models/keye-nano/", $name)) as &[u8])
    };
}

pub(crate) static FILES: EmbeddedFiles = EmbeddedFiles {
    name: crate::NANO,
    files: &[
        text!("config.json"),
        text!("generation_config.json"),
        text!("preprocessor_config.json"),
        text!("tokenizer.json"),
        text!("tokenizer_config.json"),
        text!("chat_template.json"),
        ("model.safetensors", &WEIGHTS.0),
    ],
};
