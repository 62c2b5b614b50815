//! A safetensors file of any bytes: an error, or tensors whose bytes are as many as type and shape say.
#![no_main]
use std::path::PathBuf;
use std::sync::LazyLock;

use keye_processor::Checkpoint;

/// Memory-backed where there is such a folder, so that a run does not wear a disk.
static FILE: LazyLock<PathBuf> = LazyLock::new(|| {
    let shm = PathBuf::from("/dev/shm");
    let dir = if shm.is_dir() { shm } else { std::env::temp_dir() };
    dir.join(format!("keye-fuzz-{}.safetensors", std::process::id()))
});

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    std::fs::write(&*FILE, data).unwrap();
    if let Ok(checkpoint) = Checkpoint::open_file(&FILE) {
        for name in checkpoint.names() {
            // Types that nothing here computes with are listed, but not handed out.
            let Some(tensor) = checkpoint.get(name) else { continue };
            assert!(tensor.bytes.len() <= data.len());
            assert!(checkpoint.tensor(name, &tensor.shape).is_ok());
        }
    }
});
