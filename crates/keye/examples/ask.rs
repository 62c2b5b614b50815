//! From a checkpoint to a streamed answer.
//!
//! `cargo run --release --example ask -- MODEL_DIR clip.mp4 "What happens in this clip?"`

use std::io::Write;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [model, media @ .., question] = arguments.as_slice() else { return Err("MODEL [MEDIA]... QUESTION".into()) };

    let keye = keye::Keye::load(model, keye::LoadOptions::default())?;
    for event in keye.ask(media, question)? {
        if let keye::Event::Token { text, .. } = event? {
            print!("{text}");
            std::io::stdout().flush()?;
        }
    }
    println!();
    Ok(())
}
