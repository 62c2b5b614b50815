//! One sample before it becomes tokens, wherever it comes from.

use keye_media::{ItemOptions, MediaItem, MediaKind};
use keye_world::{Clip, Media, Sample};
use serde_json::{Value, json};

/// What is said.
#[derive(Debug, Clone, PartialEq)]
pub enum Body {
    /// Messages as the chat template takes them.
    Messages(Vec<Value>),
    /// Text and media without roles: every text token is learnt.
    Segments(Vec<Value>),
    /// Text that belongs to the one picture of the sample.
    Caption(String),
}

/// A picture or clip.
#[derive(Debug, Clone, PartialEq)]
pub enum Visual {
    /// Of the world, rendered in this process, and how it is read.
    World(MediaKind, Clip, ItemOptions),
    /// Bytes or a file.
    Item(Box<MediaItem>),
}

/// A sample.
#[derive(Debug, Clone, PartialEq)]
pub struct Example {
    /// Its name, for errors.
    pub uuid: String,
    /// What is said.
    pub body: Body,
    /// In the order in which the body mentions them.
    pub media: Vec<Visual>,
}

impl Visual {
    /// Picture or clip.
    pub fn kind(&self) -> MediaKind {
        match self {
            Self::World(kind, ..) => *kind,
            Self::Item(item) => item.kind,
        }
    }
}

impl Example {
    /// With pictures and clips that are read by these options (§3.4: limits of a source).
    pub fn read_by(mut self, images: &ItemOptions, videos: &ItemOptions) -> Self {
        for visual in &mut self.media {
            let wanted = if visual.kind() == MediaKind::Image { images } else { videos };
            match visual {
                Visual::World(_, _, options) => *options = wanted.clone(),
                Visual::Item(item) => item.options = wanted.clone(),
            }
        }
        self
    }

    /// A conversation of the world.
    pub fn conversation(sample: &Sample) -> Self {
        let messages = sample.messages();
        let values = messages.iter().map(|message| serde_json::to_value(message).unwrap_or_default()).collect();
        Self { uuid: sample.uuid.clone(), body: Body::Messages(values), media: visuals(sample) }
    }

    /// A picture of the world and its caption.
    pub fn pair(sample: &Sample) -> Self {
        Self { uuid: sample.uuid.clone(), body: Body::Caption(answer(sample)), media: visuals(sample) }
    }

    /// The same, as a document.
    pub fn caption(sample: &Sample) -> Self {
        let parts = vec![json!({"type": "image"}), json!({"type": "text", "text": answer(sample)})];
        Self { uuid: sample.uuid.clone(), body: Body::Segments(parts), media: visuals(sample) }
    }
}

fn answer(sample: &Sample) -> String {
    sample.turns.first().map(|turn| turn.answer.clone()).unwrap_or_default()
}

fn visuals(sample: &Sample) -> Vec<Visual> {
    let visual = |media: &Media| match media {
        Media::Image(clip) => Visual::World(MediaKind::Image, clip.clone(), ItemOptions::default()),
        Media::Video(clip) => Visual::World(MediaKind::Video, clip.clone(), ItemOptions::default()),
    };
    sample.media.iter().map(|(_, media)| visual(media)).collect()
}
