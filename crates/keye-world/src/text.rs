//! Conversations without pictures: the world told in words.

use crate::captions::told;
use crate::{Rng, Shape, Story, Task, Turn};

/// Puts what happens in front of the first question, for models that only read.
pub(crate) fn tell(story: &Story, turns: &mut [Turn]) {
    if let Some(first) = turns.first_mut() {
        first.question = format!("{}\n{}", told(story), first.question);
    }
}

/// Counting and ordering in words alone.
pub(crate) fn sums(rng: &mut Rng) -> Turn {
    let (question, answer, task) = match rng.below(4) {
        0 => {
            let [a, b] = [rng.range(1, 5), rng.range(1, 4)];
            let [one, two] = [*rng.pick(Shape::ALL), *rng.pick(Shape::ALL)];
            let words = |n: u32, shape: Shape| if n == 1 { shape.word() } else { shape.plural() };
            let question =
                format!("There are {a} {} and {b} {}. How many things are there in all?", words(a, one), words(b, two));
            (question, (a + b).to_string(), Task::Count)
        }
        1 => {
            let a = rng.range(2, 6);
            let b = rng.range(1, a - 1);
            let shape = rng.pick(Shape::ALL).plural();
            (format!("There are {a} {shape}. Then {b} vanish. How many are left?"), (a - b).to_string(), Task::Count)
        }
        2 => {
            let [a, b] = [rng.range(0, 15), rng.range(0, 15)];
            let [a, b] = if a == b { [a, a + 1] } else { [a, b] };
            let [one, two] = [a, b].map(|halves| format!("{}.{}", halves / 2, halves % 2 * 5));
            let mut shapes = Shape::ALL.to_vec();
            rng.shuffle(&mut shapes);
            let [x, y] = [shapes[0].word(), shapes[1].word()];
            let question =
                format!("A {x} appears at {one} and a {y} at {two}. Which appears first, the {x} or the {y}?");
            (question, (if a < b { x } else { y }).to_owned(), Task::Order)
        }
        _ => {
            let from = rng.range(0, 10);
            let long = rng.range(1, 8);
            let [begin, end, lasts] =
                [from, from + long, long].map(|halves| format!("{}.{}", halves / 2, halves % 2 * 5));
            let shape = rng.pick(Shape::ALL).word();
            (format!("A {shape} is there from {begin} to {end}. How long is that?"), lasts, Task::When)
        }
    };
    Turn { task, question, answer, chance: 0.0 }
}
