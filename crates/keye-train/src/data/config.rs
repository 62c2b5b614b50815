//! What is trained on.

use std::path::{Path, PathBuf};

use keye_media::ItemOptions;
use keye_world::{Split, Task};
use serde::Deserialize;

use crate::TrainError;

/// Samples of the world.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    /// Clips with questions.
    Clip,
    /// Stills with questions.
    Still,
    /// The world in words alone.
    Text,
    /// Stills in words alone: short stories, so that many questions fit a pack.
    Note,
    /// The same captions without a question or roles: a picture, then text that is learnt as a whole (`segments`). They take
    /// two thirds of the tokens that asking for a caption does.
    Caption,
    /// Stills with captions, for contrastive training.
    Pair,
}

/// Which tokens of a conversation are learnt.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Targets {
    /// Answers, and what closes them.
    #[default]
    Answers,
    /// All text: what is told and asked as well.
    Text,
}

/// Where samples come from: the world, or files of records.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SourceConfig {
    /// Samples of the world; excludes `parquet`.
    pub world: Option<Kind>,
    /// Part of the world: train, validation or test.
    #[serde(default = "train")]
    pub split: String,
    /// Most questions about one sample of the world; it has one to so many. More of them see more of a clip for the same
    /// work of the vision tower.
    #[serde(default = "questions")]
    pub questions: u32,
    /// What is asked about samples of the world; all that can be, unless told otherwise.
    #[serde(default = "all_tasks")]
    pub tasks: Vec<Task>,
    /// Number of the first sample, so that a stage sees others than those before it.
    #[serde(default)]
    pub first: u64,
    /// Files of records (§3.4), or `.json` files that list such files; excludes `world`. Relative to the recipe, lists' entries to
    /// the list.
    #[serde(default)]
    pub parquet: Vec<PathBuf>,
    /// How pictures are read, where it is not as the model's preprocessor config says: `{ max_pixels = 50176 }`.
    #[serde(default)]
    pub images: ItemOptions,
    /// How clips are read: `{ fps = 1.0, max_frames = 64 }`.
    #[serde(default)]
    pub videos: ItemOptions,
    /// How often it is drawn, beside the weights of the others.
    #[serde(default = "one")]
    pub weight: u32,
}

/// Samples and how they are packed.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DataConfig {
    /// At least one. Pairs do not mix with the others.
    pub sources: Vec<SourceConfig>,
    /// Most tokens of a pack.
    pub max_tokens: usize,
    /// Pictures of a contrastive pack.
    #[serde(default = "pairs")]
    pub pairs: usize,
    /// Cut the last sample of a pack to fit; otherwise it begins the next pack.
    #[serde(default)]
    pub cut: bool,
    /// Chooses the order of sources and rows; which samples of the world come is `first` of its sources.
    #[serde(default)]
    pub seed: u64,
    /// Which tokens of conversations are learnt.
    #[serde(default)]
    pub targets: Targets,
    /// Packs that are prepared ahead.
    #[serde(default = "ahead")]
    pub ahead: usize,
}

fn train() -> String {
    "train".into()
}

fn questions() -> u32 {
    4
}

fn all_tasks() -> Vec<Task> {
    Task::ALL.to_vec()
}

fn one() -> u32 {
    1
}

fn pairs() -> usize {
    64
}

fn ahead() -> usize {
    4
}

impl SourceConfig {
    /// Samples of the world's training split.
    pub fn of_world(kind: Kind, weight: u32) -> Self {
        let (split, questions, tasks) = (train(), questions(), all_tasks());
        let (images, videos) = (ItemOptions::default(), ItemOptions::default());
        Self { world: Some(kind), split, questions, tasks, first: 0, parquet: Vec::new(), images, videos, weight }
    }

    /// The part of the world.
    ///
    /// # Errors
    /// A name that is no split.
    pub fn split(&self) -> Result<Split, TrainError> {
        self.split.parse().map_err(|reason| TrainError::Data(format!("split: {reason}")))
    }
}

impl DataConfig {
    /// A mix of the world's training split.
    pub fn of_world(kinds: &[(Kind, u32)], max_tokens: usize, seed: u64) -> Self {
        let sources = kinds.iter().map(|&(kind, weight)| SourceConfig::of_world(kind, weight)).collect();
        Self { sources, max_tokens, pairs: pairs(), cut: false, seed, targets: Targets::Answers, ahead: ahead() }
    }

    /// Reads the table `data` of a recipe.
    ///
    /// # Errors
    /// Fields that are missing, unknown or of another type; what [`DataConfig::check`] refuses.
    pub fn from_table(table: &toml::Table) -> Result<Self, TrainError> {
        let config: Self = table.clone().try_into().map_err(|error| TrainError::Data(format!("{error}")))?;
        config.check()?;
        Ok(config)
    }

    /// Its files of records, relative to a folder: the recipe's.
    pub fn beside(mut self, folder: &Path) -> Self {
        let files = self.sources.iter_mut().flat_map(|source| &mut source.parquet);
        files.for_each(|file| *file = folder.join(&*file));
        self
    }

    /// The same samples of the world, of the split that is held out.
    ///
    /// # Errors
    /// Files of records, which have no such split.
    pub fn held_out(&self) -> Result<Self, TrainError> {
        let mut config = self.clone();
        for source in &mut config.sources {
            if source.world.is_none() {
                let reason = "validation: files of records have no part held out; name some in [validation.data]";
                return Err(TrainError::Data(reason.into()));
            }
            source.split = Split::Validation.name().into();
        }
        Ok(config)
    }

    /// Whether packs are for contrastive training.
    pub fn contrastive(&self) -> bool {
        self.sources.iter().any(|source| source.world == Some(Kind::Pair))
    }

    /// Checks what can be checked without reading data.
    ///
    /// # Errors
    /// No source or no weight; sources of no kind or two; pairs beside others; sizes of 0.
    pub fn check(&self) -> Result<(), TrainError> {
        let wrong = |what: String| Err(TrainError::Data(what));
        if self.sources.iter().all(|source| source.weight == 0) {
            return wrong("sources: expected at least one with a weight above 0".into());
        }
        for (i, source) in self.sources.iter().enumerate() {
            source.split()?;
            if !(1..=64).contains(&source.questions) {
                return wrong(format!("source {i}: questions: expected 1 to 64, found {}", source.questions));
            }
            if source.world.is_some() != source.parquet.is_empty() {
                return wrong(format!("source {i}: expected either world or parquet, found both or neither"));
            }
            if self.contrastive() && source.world != Some(Kind::Pair) {
                return wrong(format!("source {i}: pairs are trained on their own, without other sources"));
            }
        }
        match self.max_tokens == 0 || self.pairs == 0 || self.ahead == 0 {
            true => wrong("max_tokens, pairs and ahead: expected 1 or more".into()),
            false => Ok(()),
        }
    }
}
