//! Samples by index.

use std::sync::Arc;

use crate::captions::caption;
use crate::compose::{Emphasis, compose};
use crate::questions::ask;
use crate::{Clip, Media, Rng, Sample, Split, Story, Task, Turn, text};

/// The samples of one split. Every kind of sample is numbered from 0 on, without end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct World {
    split: Split,
    questions: u32,
    /// A bit for each of [`Task::every`].
    tasks: u32,
}

/// Streams of numbers, so that kinds of samples do not share stories.
#[derive(Clone, Copy)]
enum Stream {
    Clip = 1,
    Still = 2,
    Text = 3,
    Pair = 4,
    Question = 5,
    Note = 6,
}

/// Most questions about one clip, unless told otherwise.
const QUESTIONS: u32 = 4;
/// How many stories are tried for a question of a given kind.
const STORIES: u64 = 256;

/// The numbers of questions of [`Task::BY_NAME`] are behind all others.
const BY_NAME: u64 = 1 << 40;

/// The name of a sample's only picture or clip.
const MEDIA: &str = "0";

impl World {
    /// A split of the world.
    pub fn new(split: Split) -> Self {
        Self { split, questions: QUESTIONS, tasks: 0 }.with_tasks(&Task::ALL)
    }

    /// The same world with one to `most` questions a sample, where its story has so many; at least 1.
    #[must_use]
    pub fn with_questions(self, most: u32) -> Self {
        Self { questions: most.max(1), ..self }
    }

    /// The same world that asks only these, where its story allows; a caption where it does not.
    #[must_use]
    pub fn with_tasks(self, tasks: &[Task]) -> Self {
        Self { tasks: tasks.iter().fold(0, |set, task| set | 1 << *task as u32), ..self }
    }

    /// Its split.
    pub fn split(&self) -> Split {
        self.split
    }

    /// A clip and one to four questions about it ([`World::with_questions`]).
    pub fn clip(&self, index: u64) -> Sample {
        let mut rng = self.rng(Stream::Clip, index);
        let emphasis = *rng.pick(&Emphasis::ALL);
        let story = compose(&mut rng, self.split, emphasis, false);
        let turns = self.turns(&mut rng, &story);
        self.sample(Stream::Clip, index, story, turns)
    }

    /// A picture and one to four questions about it ([`World::with_questions`]).
    pub fn still(&self, index: u64) -> Sample {
        let (mut rng, story) = self.picture(Stream::Still, index);
        let turns = self.turns(&mut rng, &story);
        self.sample(Stream::Still, index, story, turns)
    }

    /// The same world in words: what happens, then questions; or a small sum.
    pub fn text(&self, index: u64) -> Sample {
        let mut rng = self.rng(Stream::Text, index);
        let emphasis = *rng.pick(&Emphasis::ALL);
        let still = rng.chance(1, 5);
        let story = compose(&mut rng, self.split, emphasis, still);
        let turns = match rng.chance(1, 8) {
            true => vec![text::sums(&mut rng)],
            false => {
                let mut turns = self.turns(&mut rng, &story);
                text::tell(&story, &mut turns);
                turns
            }
        };
        self.sample(Stream::Text, index, story, turns)
    }

    /// A still in words, and questions.
    pub fn note(&self, index: u64) -> Sample {
        let (mut rng, story) = self.picture(Stream::Note, index);
        let mut turns = self.turns(&mut rng, &story);
        text::tell(&story, &mut turns);
        self.sample(Stream::Note, index, story, turns)
    }

    /// A picture and its caption, for learning to match the two. The question is empty.
    pub fn pair(&self, index: u64) -> Sample {
        let (_, story) = self.picture(Stream::Pair, index);
        let turn = Turn { task: Task::Caption, question: String::new(), answer: caption(&story), chance: 0.0 };
        self.sample(Stream::Pair, index, story, vec![turn])
    }

    /// A clip and one question of the given kind about it, for tests.
    pub fn question(&self, task: Task, index: u64) -> Sample {
        let base = match task {
            Task::Follow | Task::Point => BY_NAME * (1 + task as u64) + index,
            _ => index * Task::ALL.len() as u64 + task as u64,
        };
        let mut last = None;
        for attempt in 0..STORIES {
            let mut rng = Rng::new(&[self.split as u64, Stream::Question as u64, base, attempt]);
            let emphasis = match task {
                Task::Order => *rng.pick(&[Emphasis::Arrivals, Emphasis::Motion]),
                Task::When => *rng.pick(&[Emphasis::Arrivals, Emphasis::Motion, Emphasis::Letters]),
                Task::Motion => *rng.pick(&[Emphasis::Motion, Emphasis::Motion, Emphasis::Gallery]),
                Task::Change => Emphasis::Change,
                Task::Contact => *rng.pick(&[Emphasis::Contact, Emphasis::Contact, Emphasis::Motion]),
                Task::Scene => *rng.pick(&[Emphasis::Cut, Emphasis::Cut, Emphasis::Gallery]),
                Task::Reading => Emphasis::Letters,
                Task::Count | Task::Compare => *rng.pick(&[Emphasis::Gallery, Emphasis::Gallery, Emphasis::Arrivals]),
                _ => *rng.pick(&Emphasis::ALL),
            };
            let story = compose(&mut rng, self.split, emphasis, false);
            let turn = ask(&mut rng, &story, task);
            let found = turn.is_some();
            last = Some(self.sample(Stream::Question, base, story, turn.into_iter().collect()));
            if found {
                break;
            }
        }
        last.expect("at least one story is tried")
    }

    fn rng(&self, stream: Stream, index: u64) -> Rng {
        Rng::new(&[self.split as u64, stream as u64, index])
    }

    /// A story of one frame, and what is left of its numbers.
    fn picture(&self, stream: Stream, index: u64) -> (Rng, Story) {
        let mut rng = self.rng(stream, index);
        let emphasis = *rng.pick(&[Emphasis::Gallery, Emphasis::Gallery, Emphasis::Letters]);
        let story = compose(&mut rng, self.split, emphasis, true);
        (rng, story)
    }

    fn turns(&self, rng: &mut Rng, story: &Story) -> Vec<Turn> {
        let wanted = rng.range(1, self.questions) as usize;
        let asked = |task: Task| self.tasks >> task as u32 & 1 == 1;
        // Draws are among those asked by name only where one of them is asked: all other samples stay what they were without them.
        let by_name = Task::BY_NAME.into_iter().any(asked);
        let tasks: Vec<Task> = if by_name { Task::every().collect() } else { Task::ALL.to_vec() };
        let mut turns: Vec<Turn> = Vec::new();
        for _ in 0..self.questions * 6 {
            let task = *rng.pick(&tasks);
            let long = matches!(task, Task::Caption | Task::DenseCaption);
            let known = |turn: &Turn| turn.task == task && (long || task == Task::Reading || task == Task::When);
            if !asked(task) || turns.len() == wanted || turns.iter().any(known) {
                continue;
            }
            if let Some(turn) = ask(rng, story, task).filter(|turn| turns.iter().all(|t| t.question != turn.question)) {
                turns.push(turn);
            }
        }
        if turns.is_empty() {
            turns.extend(ask(rng, story, Task::Caption));
        }
        turns
    }

    fn sample(&self, stream: Stream, index: u64, story: Story, turns: Vec<Turn>) -> Sample {
        let story = Arc::new(story);
        let clip = || Clip::new(Arc::clone(&story));
        let (source, media) = match stream {
            Stream::Clip | Stream::Question => ("world-video", Some(Media::Video(clip()))),
            Stream::Still => ("world-image", Some(Media::Image(clip()))),
            Stream::Pair => ("world-pair", Some(Media::Image(clip()))),
            Stream::Text | Stream::Note => ("world-text", None),
        };
        let kind = match stream {
            Stream::Question => "question",
            Stream::Note => "note",
            _ => &source[6..],
        };
        let uuid = format!("{}-{kind}-{index}", self.split);
        Sample { uuid, source, turns, media: media.map(|media| (MEDIA.to_owned(), media)).into_iter().collect(), story }
    }
}
