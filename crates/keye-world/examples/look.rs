//! Prints samples, and writes their frames side by side: `look OUT.png SPLIT FIRST COUNT`.

use keye_world::{Sample, World};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [out, split, first, count] = &arguments[..] else { return Err("usage: look OUT.png SPLIT FIRST COUNT".into()) };
    let world = World::new(split.parse()?);
    let first: u64 = first.parse()?;
    let samples: Vec<Sample> = (first..first + count.parse::<u64>()?).map(|index| world.clip(index)).collect();
    let (cell, gap, columns) = (140, 4, 12);
    let (width, height) = (columns * (cell + gap), samples.len() as u32 * (cell + gap));
    let mut sheet = image::RgbImage::from_pixel(width, height, image::Rgb([60, 60, 80]));
    for (row, sample) in samples.iter().enumerate() {
        println!("{row}: {} {:.1} s", sample.uuid, sample.story.seconds());
        for turn in &sample.turns {
            println!("   [{}] {:?} -> {:?}", turn.task, turn.question, turn.answer);
        }
        let clip = sample.media[0].1.clip();
        for (column, frame) in (0..clip.len()).step_by(2).take(columns as usize).enumerate() {
            let picture = image::RgbImage::from_raw(clip.width(), clip.height(), clip.frame(frame)).ok_or("size")?;
            let at = [column as u32, row as u32].map(|n| i64::from(n * (cell + gap)));
            image::imageops::replace(&mut sheet, &picture, at[0], at[1]);
        }
    }
    sheet.save(out)?;
    Ok(())
}
