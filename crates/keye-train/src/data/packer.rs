//! Samples one after the other, until a pack is full.

use std::sync::Arc;

use keye_processor::Processor;
use keye_world::{Rng, World};
use serde::{Deserialize, Serialize};

use super::config::{DataConfig, Kind, SourceConfig};
use super::encode::Encoder;
use super::example::Example;
use crate::{Pack, TrainError};

/// Samples in a row that may be left out before the data are held to be unfit.
const LEFT_OUT: u32 = 100;

/// All that decides what comes next.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct State {
    /// Samples drawn so far.
    drawn: u64,
    /// Next sample of each source.
    next: Vec<u64>,
    /// The sample that did not fit the last pack: its source and number.
    held: Option<(usize, u64)>,
}

enum Source {
    World(World, Kind),
    #[cfg(feature = "parquet")]
    Rows(super::rows::Rows),
}

/// Draws samples and packs them.
pub(crate) struct Packer {
    config: DataConfig,
    encoder: Encoder,
    sources: Vec<Source>,
    pub(crate) state: State,
    /// Why samples since this was last emptied had no size; for display.
    pub(crate) no_size: Vec<String>,
}

impl Packer {
    pub(crate) fn new(config: DataConfig, processor: Arc<Processor>) -> Result<Self, TrainError> {
        config.check()?;
        let mut sources = Vec::with_capacity(config.sources.len());
        for source in &config.sources {
            sources.push(match source.world {
                Some(kind) => {
                    let world = World::new(source.split()?).with_questions(source.questions);
                    Source::World(world.with_tasks(&source.tasks), kind)
                }
                #[cfg(feature = "parquet")]
                None => Source::Rows(super::rows::Rows::open(&source.parquet, config.seed)?),
                #[cfg(not(feature = "parquet"))]
                None => return Err(TrainError::Data("files of records need a build with the feature parquet".into())),
            });
        }
        let next = config.sources.iter().map(|source| source.first).collect();
        let state = State { drawn: 0, next, held: None };
        let encoder = Encoder::new(processor).with_targets(config.targets);
        Ok(Self { config, encoder, sources, state, no_size: Vec::new() })
    }

    /// Goes on from a state.
    ///
    /// # Errors
    /// A state of another number of sources.
    pub(crate) fn restore(&mut self, state: State) -> Result<(), TrainError> {
        let sources = self.sources.len();
        if state.next.len() != sources || state.held.is_some_and(|(source, _)| source >= sources) {
            let found = state.next.len();
            return Err(TrainError::Data(format!("the state is one of {found} sources, the recipe has {sources}")));
        }
        self.state = state;
        Ok(())
    }

    pub(crate) fn next_pack(&mut self) -> Result<Pack, TrainError> {
        let mut pack = Pack::default();
        let mut left_out = 0;
        loop {
            let id = match self.state.held.take() {
                Some(held) => held,
                None => self.draw(),
            };
            let example = self.example(id)?;
            let sample = match self.encoder.encode(&example, self.config.max_tokens) {
                Err(TrainError::NoSize(reason)) => {
                    self.no_size.push(reason);
                    None
                }
                encoded => encoded?,
            };
            let Some(sample) = sample else {
                left_out += 1;
                if left_out == LEFT_OUT {
                    let reason = "samples in a row are too long, have nothing to learn or pictures that no size fits; are \
                                  max_tokens and the limits of pictures large enough?";
                    return Err(TrainError::Data(format!("{}: {LEFT_OUT} {reason}", example.uuid)));
                }
                continue;
            };
            left_out = 0;
            let room = self.config.max_tokens - pack.len();
            if sample.pack.len() > room {
                match sample.cut(room).filter(|_| self.config.cut) {
                    Some(part) => pack.push(&part),
                    None => self.state.held = Some(id),
                }
                return Ok(pack);
            }
            pack.push(&sample.pack);
            let full = pack.len() == self.config.max_tokens;
            if full || self.config.contrastive() && pack.grids.len() == self.config.pairs {
                return Ok(pack);
            }
        }
    }

    /// Source and number of the next sample.
    fn draw(&mut self) -> (usize, u64) {
        let weights = || self.config.sources.iter().map(|source| u64::from(source.weight));
        let total = weights().sum::<u64>().min(u64::from(u32::MAX)) as u32;
        let mut at = u64::from(Rng::new(&[self.config.seed, self.state.drawn]).below(total));
        self.state.drawn += 1;
        let mut source = 0;
        for (index, weight) in weights().enumerate() {
            source = index;
            if at < weight {
                break;
            }
            at -= weight;
        }
        let number = self.state.next[source];
        self.state.next[source] += 1;
        (source, number)
    }

    fn example(&mut self, (source, number): (usize, u64)) -> Result<Example, TrainError> {
        let SourceConfig { images, videos, .. } = &self.config.sources[source];
        let example = match &mut self.sources[source] {
            #[cfg(feature = "parquet")]
            Source::Rows(rows) => rows.example(number)?,
            Source::World(world, Kind::Clip) => Example::conversation(&world.clip(number)),
            Source::World(world, Kind::Still) => Example::conversation(&world.still(number)),
            Source::World(world, Kind::Text) => Example::conversation(&world.text(number)),
            Source::World(world, Kind::Note) => Example::conversation(&world.note(number)),
            Source::World(world, Kind::Caption) => Example::caption(&world.pair(number)),
            Source::World(world, Kind::Pair) => Example::pair(&world.pair(number)),
        };
        Ok(example.read_by(images, videos))
    }
}
