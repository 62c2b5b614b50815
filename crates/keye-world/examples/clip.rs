//! Writes one clip as mp4, and prints what can be asked about it: `clip OUT.mp4 SPLIT NUMBER`.

use keye_world::{World, write_mp4};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [out, split, number] = &arguments[..] else { return Err("usage: clip OUT.mp4 SPLIT NUMBER".into()) };
    let sample = World::new(split.parse()?).clip(number.parse()?);
    write_mp4(sample.media[0].1.clip(), out.as_ref())?;
    for turn in &sample.turns {
        println!("[{}] {:?} -> {:?}", turn.task, turn.question, turn.answer);
    }
    Ok(())
}
