//! Samples one after the other, until a pack is full. Some are prepared at a time, on several threads; which samples come, and what
//! of them is in a pack, does not depend on how many.

use std::collections::VecDeque;
use std::sync::Arc;

use keye_processor::Processor;
use keye_world::{Rng, World};
use rayon::prelude::*;
use rayon::{ThreadPool, ThreadPoolBuilder};
use serde::{Deserialize, Serialize};

use super::config::{DataConfig, Kind, SourceConfig};
use super::encode::{Encoded, Encoder};
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

/// Source and number of a sample.
type Id = (usize, u64);

/// A sample that is ready; `None` where it has nothing to learn or stays too long.
struct Prepared {
    id: Id,
    uuid: String,
    sample: Result<Option<Encoded>, TrainError>,
}

/// Draws samples and packs them.
pub(crate) struct Packer {
    config: DataConfig,
    encoder: Encoder,
    sources: Vec<Source>,
    threads: ThreadPool,
    pub(crate) state: State,
    /// The samples that come next, the held one first where there is one.
    prepared: VecDeque<Prepared>,
    /// Why samples since this was last emptied had no size; for display.
    pub(crate) no_size: Vec<String>,
}

impl Packer {
    /// `threads` prepare samples, a few for each of them ahead.
    pub(crate) fn new(config: DataConfig, processor: Arc<Processor>, threads: usize) -> Result<Self, TrainError> {
        config.check()?;
        let threads = ThreadPoolBuilder::new().num_threads(threads).thread_name(|i| format!("data-{i}")).build();
        let threads = threads.map_err(|error| TrainError::Data(format!("no threads for reading data: {error}")))?;
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
        Ok(Self { config, encoder, sources, threads, state, prepared: VecDeque::new(), no_size: Vec::new() })
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
        self.prepared.clear();
        Ok(())
    }

    pub(crate) fn next_pack(&mut self) -> Result<Pack, TrainError> {
        let mut pack = Pack::default();
        let mut left_out = 0;
        loop {
            let Prepared { id, uuid, sample } = self.next_sample()?;
            let sample = match sample {
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
                    return Err(TrainError::Data(format!("{uuid}: {LEFT_OUT} {reason}")));
                }
                continue;
            };
            left_out = 0;
            let room = self.config.max_tokens - pack.len();
            if sample.pack.len() > room {
                match sample.cut(room).filter(|_| self.config.cut) {
                    Some(part) => pack.push(&part),
                    None => {
                        self.state.held = Some(id);
                        self.prepared.push_front(Prepared { id, uuid, sample: Ok(Some(sample)) });
                    }
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

    /// The next sample; the state is the one behind it.
    fn next_sample(&mut self) -> Result<Prepared, TrainError> {
        if self.prepared.is_empty() {
            self.prepare();
        }
        let ended = || TrainError::Data("no sample could be drawn".into());
        let next = self.prepared.pop_front().ok_or_else(ended)?;
        if self.state.held.take().is_none() {
            self.state.drawn += 1;
            self.state.next[next.id.0] += 1;
        }
        Ok(next)
    }

    /// Prepares the samples that come next: as many as threads, or twice as many where there are several, since some take longer.
    fn prepare(&mut self) {
        let threads = self.threads.current_num_threads();
        let count = if threads == 1 { 1 } else { 2 * threads };
        let State { mut drawn, mut next, held } = self.state.clone();
        let mut ids: Vec<Id> = held.into_iter().collect();
        while ids.len() < count {
            let source = self.draw(drawn);
            ids.push((source, next[source]));
            drawn += 1;
            next[source] += 1;
        }
        let examples: Vec<_> = ids.into_iter().map(|id| (id, self.example(id))).collect();
        let (encoder, most) = (&self.encoder, self.config.max_tokens);
        let encoded = self.threads.install(|| {
            let encoded = examples.into_par_iter().map(|(id, example)| match example {
                Ok(example) => {
                    let sample = encoder.encode(&example, most);
                    Prepared { id, uuid: example.uuid, sample }
                }
                Err(error) => Prepared { id, uuid: String::new(), sample: Err(error) },
            });
            encoded.collect::<Vec<_>>()
        });
        self.prepared.extend(encoded);
    }

    /// The source of the sample that is drawn after `drawn` others.
    fn draw(&self, drawn: u64) -> usize {
        let weights = || self.config.sources.iter().map(|source| u64::from(source.weight));
        let total = weights().sum::<u64>().min(u64::from(u32::MAX)) as u32;
        let mut at = u64::from(Rng::new(&[self.config.seed, drawn]).below(total));
        let mut source = 0;
        for (index, weight) in weights().enumerate() {
            source = index;
            if at < weight {
                break;
            }
            at -= weight;
        }
        source
    }

    fn example(&mut self, (source, number): Id) -> Result<Example, TrainError> {
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

#[cfg(test)]
mod tests {
    use std::path::Path;

    use keye_processor::Overrides;

    use super::*;

    #[test]
    fn packs_do_not_depend_on_threads() {
        let nano = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../models/keye-nano");
        let processor = Arc::new(Processor::load(&nano, &Overrides::default()).unwrap());
        let config = DataConfig::of_world(&[(Kind::Clip, 1), (Kind::Still, 2), (Kind::Text, 1)], 700, 7);
        let packer = |threads: usize| Packer::new(config.clone(), Arc::clone(&processor), threads).unwrap();
        let (mut one, mut three) = (packer(1), packer(3));
        let (mut packs, mut states) = (Vec::new(), Vec::new());
        for _ in 0..8 {
            packs.push(one.next_pack().unwrap());
            assert!(packs.last() == Some(&three.next_pack().unwrap()));
            assert_eq!(one.state, three.state);
            states.push(one.state.clone());
        }
        assert!(states.iter().any(|state| state.held.is_some()), "some samples begin the next pack");
        // Going on from a state in the middle, with what was prepared behind it thrown away.
        let mut again = packer(2);
        (0..2).for_each(|_| drop(again.next_pack().unwrap()));
        again.restore(states[4].clone()).unwrap();
        for (pack, state) in packs.iter().zip(&states).skip(5) {
            assert!(again.next_pack().unwrap() == *pack);
            assert_eq!(again.state, *state);
        }
    }
}
