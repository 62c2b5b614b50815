//! Samples as rows of a data set (`docs/spec/training.md` §3.4).

use std::collections::BTreeMap;
use std::path::Path;

use serde::{Deserialize, Serialize};

use crate::{Media, Message, Sample, WriteError, write_mp4, write_png};

/// A row: what is said, and where its pictures and clips are.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Record {
    /// Names the sample.
    pub uuid: String,
    /// Name of the data set.
    pub source: String,
    /// The conversation.
    pub messages: Vec<Message>,
    /// Path of each picture by its name, relative to the directory of the file of records.
    pub images: BTreeMap<String, String>,
    /// Path of each clip by its name, relative to the directory of the file of records.
    pub videos: BTreeMap<String, String>,
}

impl Record {
    /// The row of a sample; its pictures and clips are written to `dir/media`.
    ///
    /// # Errors
    /// When a file cannot be written.
    pub fn write(sample: &Sample, dir: &Path) -> Result<Self, WriteError> {
        let folder = dir.join("media");
        std::fs::create_dir_all(&folder).map_err(|source| WriteError::Io { path: folder.clone(), source })?;
        let (mut images, mut videos) = (BTreeMap::new(), BTreeMap::new());
        for (name, media) in &sample.media {
            let stem = format!("{}-{name}", sample.uuid);
            match media {
                Media::Image(clip) => {
                    write_png(clip, &folder.join(format!("{stem}.png")))?;
                    images.insert(name.clone(), format!("media/{stem}.png"));
                }
                Media::Video(clip) => {
                    write_mp4(clip, &folder.join(format!("{stem}.mp4")))?;
                    videos.insert(name.clone(), format!("media/{stem}.mp4"));
                }
            }
        }
        let source = sample.source.to_owned();
        Ok(Self { uuid: sample.uuid.clone(), source, messages: sample.messages(), images, videos })
    }
}
