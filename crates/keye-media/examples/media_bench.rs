//! What clips and photos cost to load, beside `ffmpeg` or `djpeg` that only decode them, in one run.
//!
//! ```text
//! cargo run --release -p keye-media --example media_bench -- [--json] [--rounds N] [--preview] [FILE...]
//! ```
//!
//! Without a file it makes a minute of 720p (kept as `keye-sample-720p.mp4` in the folder for temporary files) and a
//! photo of 12 megapixels.

use std::error::Error;
use std::path::PathBuf;

use keye_media::{ItemOptions, Loader, MediaConfig, MediaCost, MediaItem, MediaKind, Source, media_cost};

fn main() -> Result<(), Box<dyn Error>> {
    let (mut json, mut rounds, mut config, mut files) = (false, 3, MediaConfig::slow_fast(), Vec::new());
    let mut words = std::env::args().skip(1);
    while let Some(word) = words.next() {
        match word.as_str() {
            "--json" => json = true,
            "--preview" => config = MediaConfig::preview(),
            "--rounds" => rounds = words.next().ok_or("--rounds needs a number")?.parse()?,
            file => files.push(PathBuf::from(file)),
        }
    }
    if files.is_empty() {
        let folder = std::env::temp_dir();
        files = vec![folder.join("keye-sample-720p.mp4"), folder.join("keye-sample-12mp.jpg")];
        if !files[0].exists() {
            eprintln!("making {} ...", files[0].display());
            keye_media::write_sample_clip(&files[0])?;
        }
        if !files[1].exists() {
            keye_media::write_sample_photo(&files[1])?;
        }
    }
    let loader = Loader::new(config);
    let mut costs = Vec::new();
    for file in &files {
        let picture = file.extension().is_some_and(|e| ["jpg", "jpeg", "png", "webp"].iter().any(|known| e == *known));
        let kind = if picture { MediaKind::Image } else { MediaKind::Video };
        let item = MediaItem { kind, source: Source::Path(file.clone()), options: ItemOptions::default() };
        let cost = media_cost(&loader, &item, file, rounds)?;
        if !json {
            print(&cost);
        }
        costs.push(cost);
    }
    if json {
        println!("{}", serde_json::to_string_pretty(&costs)?);
    }
    Ok(())
}

fn print(cost: &MediaCost) {
    println!("{}: {} frames, {} patches", cost.clip, cost.frames, cost.patches);
    println!("  {:15} {:7.3} CPU-s {:7.3} s", format!("{} alone", cost.decoder), cost.decode_cpu_s, cost.decode_wall_s);
    println!(
        "  to patches      {:7.3} CPU-s {:7.3} s; resident {:.0} + {:.0} MB",
        cost.cpu_s, cost.wall_s, cost.rss_mb, cost.child_rss_mb
    );
    println!("  ratio           {:7.3}       {:7.3}", cost.ratio_to_decode, cost.wall_ratio_to_decode);
}
