//! What the world hands out.

use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::{Clip, Story};

/// What is asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Task {
    /// All that is seen, in sentences.
    Caption,
    /// All that happens, with times.
    DenseCaption,
    /// Colour, shape or size of a thing.
    Attribute,
    /// Where a thing is.
    Where,
    /// How a thing moves.
    Motion,
    /// How many there are.
    Count,
    /// Which comes or goes first.
    Order,
    /// From when to when: temporal grounding.
    When,
    /// What a thing turns into.
    Change,
    /// What hits what.
    Contact,
    /// Background and cuts.
    Scene,
    /// Letters and digits to read.
    Reading,
    /// Which is larger, of what there are more.
    Compare,
    /// One of four answers, by its letter.
    Choice,
    /// Whether something is there that may not be, or a question about something that is not.
    Trap,
    /// What one thing does, with times. Asked only where it is asked for by name.
    Follow,
    /// Where things are, as points, also from frame to frame. Asked only where it is asked for by name.
    Point,
}

impl Task {
    /// What is asked unless tasks are named, in order.
    pub const ALL: [Self; 15] = [
        Self::Caption,
        Self::DenseCaption,
        Self::Attribute,
        Self::Where,
        Self::Motion,
        Self::Count,
        Self::Order,
        Self::When,
        Self::Change,
        Self::Contact,
        Self::Scene,
        Self::Reading,
        Self::Compare,
        Self::Choice,
        Self::Trap,
    ];

    /// What is asked by name only, in order.
    pub const BY_NAME: [Self; 2] = [Self::Follow, Self::Point];

    /// [`Task::ALL`], then [`Task::BY_NAME`].
    pub fn every() -> impl Iterator<Item = Self> {
        Self::ALL.into_iter().chain(Self::BY_NAME)
    }

    /// Its name in records and on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Self::Caption => "caption",
            Self::DenseCaption => "dense-caption",
            Self::Attribute => "attribute",
            Self::Where => "where",
            Self::Motion => "motion",
            Self::Count => "count",
            Self::Order => "order",
            Self::When => "when",
            Self::Change => "change",
            Self::Contact => "contact",
            Self::Scene => "scene",
            Self::Reading => "reading",
            Self::Compare => "compare",
            Self::Choice => "choice",
            Self::Trap => "trap",
            Self::Follow => "follow",
            Self::Point => "point",
        }
    }
}

impl fmt::Display for Task {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Task {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        Self::every().find(|task| task.name() == text).ok_or_else(|| {
            let names: Vec<&str> = Self::every().map(|task| task.name()).collect();
            format!("expected one of {}, found {text:?}", names.join(", "))
        })
    }
}

/// A question and its answer.
#[derive(Debug, Clone, PartialEq)]
pub struct Turn {
    /// What is asked.
    pub task: Task,
    /// As the user says it.
    pub question: String,
    /// As the assistant says it.
    pub answer: String,
    /// What guessing without looking scores, 0 to 1, given the question's possible answers.
    pub chance: f32,
}

/// Who speaks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    /// Rules of the conversation.
    System,
    /// Asks.
    User,
    /// Answers.
    Assistant,
}

/// A part of a message, as records have it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "lowercase")]
pub enum Part {
    /// Words.
    Text {
        /// The words.
        text: String,
    },
    /// A picture by its name in the sample.
    Image {
        /// The name.
        image: String,
    },
    /// A clip by its name in the sample.
    Video {
        /// The name.
        video: String,
    },
}

/// Part of a conversation.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Message {
    /// Who speaks.
    pub role: Role,
    /// What is said, in order.
    pub content: Vec<Part>,
}

/// What a conversation is about.
#[derive(Debug, Clone, PartialEq)]
pub enum Media {
    /// A still.
    Image(Clip),
    /// A clip.
    Video(Clip),
}

impl Media {
    /// The frames.
    pub fn clip(&self) -> &Clip {
        match self {
            Self::Image(clip) | Self::Video(clip) => clip,
        }
    }
}

/// A conversation with its truth.
#[derive(Debug, Clone, PartialEq)]
pub struct Sample {
    /// Names it among all samples of the world.
    pub uuid: String,
    /// `world-video`, `world-image`, `world-text` or `world-pair`.
    pub source: &'static str,
    /// Questions and answers in order; the media stand before the first.
    pub turns: Vec<Turn>,
    /// The media by name; none in texts.
    pub media: Vec<(String, Media)>,
    /// What happens; texts tell it in words.
    pub story: Arc<Story>,
}

impl Sample {
    /// The conversation as records have it.
    pub fn messages(&self) -> Vec<Message> {
        let mut media = self.media.iter().map(|(name, media)| match media {
            Media::Image(_) => Part::Image { image: name.clone() },
            Media::Video(_) => Part::Video { video: name.clone() },
        });
        let mut messages = Vec::with_capacity(self.turns.len() * 2);
        for turn in &self.turns {
            let text = |text: &str| Part::Text { text: text.to_owned() };
            messages
                .push(Message { role: Role::User, content: media.by_ref().chain([text(&turn.question)]).collect() });
            messages.push(Message { role: Role::Assistant, content: vec![text(&turn.answer)] });
        }
        messages
    }
}
