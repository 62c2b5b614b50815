//! Answers against the truth, 0 to 1.

use std::collections::BTreeSet;

use keye_world::{Colour, Shape, Story, Task, Turn};

/// How good an answer is: for times, intersection over union; for reading, one minus the edit distance in letters per
/// letter; for captions, F1 of the things named; for dense captions, intersection over union of each event with what was
/// said about it; for all else, 1 when it is right.
pub fn score(turn: &Turn, story: &Story, answer: &str) -> f64 {
    match turn.task {
        Task::When => match (interval(&turn.answer), interval(answer)) {
            (Some(truth), Some(said)) => overlap(truth, said),
            _ => 0.0,
        },
        Task::Reading => {
            let (truth, said) = (letters(&turn.answer), letters(answer));
            let longest = truth.len().max(said.len()).max(1);
            1.0 - edit_distance(&truth, &said) as f64 / longest as f64
        }
        Task::Caption => {
            let truth = story.things.iter().map(|thing| (thing.colour, thing.shape)).collect();
            f1(&truth, &named(answer))
        }
        Task::DenseCaption | Task::Follow => dense(&turn.answer, answer),
        Task::Point => points(&turn.answer, answer),
        _ => f64::from(exact(turn, answer)),
    }
}

/// Whether an answer is right: equal after [`normalise`]; a letter for choices; the same times.
pub fn exact(turn: &Turn, answer: &str) -> bool {
    match turn.task {
        Task::Choice => letter(answer) == letter(&turn.answer),
        Task::When => interval(answer).is_some() && interval(answer) == interval(&turn.answer),
        Task::Reading => letters(answer) == letters(&turn.answer),
        _ => normalise(answer) == normalise(&turn.answer),
    }
}

const NUMBERS: [&str; 11] = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"];

/// Lower case words without articles, full stops and doubled spaces; numbers up to ten as digits.
pub fn normalise(answer: &str) -> String {
    let lower = answer.to_lowercase();
    let words = lower.split(|c: char| c.is_whitespace() || matches!(c, '.' | ',' | '!' | '"' | ':' | ';'));
    let words = words.filter(|word| !matches!(*word, "" | "the" | "a" | "an"));
    let words = words.map(|word| match NUMBERS.iter().position(|number| *number == word) {
        Some(number) => number.to_string(),
        None => word.to_owned(),
    });
    words.collect::<Vec<_>>().join(" ")
}

/// The first of the letters A to D that stands alone.
fn letter(answer: &str) -> Option<char> {
    let mut words = answer.split(|c: char| !c.is_alphanumeric());
    words.find_map(|word| match word.to_ascii_uppercase().as_str() {
        one @ ("A" | "B" | "C" | "D") => one.chars().next(),
        _ => None,
    })
}

/// Letters and digits, capital.
fn letters(answer: &str) -> Vec<char> {
    answer.chars().filter(|c| c.is_alphanumeric()).map(|c| c.to_ascii_uppercase()).collect()
}

/// The first two numbers of a text, in order.
fn interval(text: &str) -> Option<[f64; 2]> {
    let mut numbers = text.split(|c: char| !c.is_ascii_digit() && c != '.').filter_map(|word| word.parse::<f64>().ok());
    let [from, until] = [numbers.next()?, numbers.next()?];
    (from <= until).then_some([from, until])
}

/// Intersection over union of two time spans.
fn overlap(a: [f64; 2], b: [f64; 2]) -> f64 {
    let union = a[1].max(b[1]) - a[0].min(b[0]);
    if union == 0.0 {
        return f64::from(a == b);
    }
    ((a[1].min(b[1]) - a[0].max(b[0])) / union).max(0.0)
}

fn edit_distance(a: &[char], b: &[char]) -> usize {
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, x) in a.iter().enumerate() {
        let mut diagonal = std::mem::replace(&mut row[0], i + 1);
        for (j, y) in b.iter().enumerate() {
            let changed = diagonal + usize::from(x != y);
            diagonal = row[j + 1];
            row[j + 1] = changed.min(diagonal + 1).min(row[j] + 1);
        }
    }
    row[b.len()]
}

/// The things that a text names: a colour and the shape behind it.
fn named(text: &str) -> BTreeSet<(Colour, Shape)> {
    let text = normalise(text);
    let words: Vec<&str> = text.split(' ').collect();
    let pair = |pair: &[&str]| {
        let colour = Colour::ALL.iter().find(|colour| colour.word() == pair[0])?;
        let shape = Shape::ALL.iter().find(|shape| shape.word() == pair[1])?;
        Some((*colour, *shape))
    };
    words.windows(2).filter_map(pair).collect()
}

fn f1<T: Ord>(truth: &BTreeSet<T>, said: &BTreeSet<T>) -> f64 {
    let both = truth.intersection(said).count() as f64;
    match truth.len() + said.len() {
        0 => 1.0,
        total => 2.0 * both / total as f64,
    }
}

/// Every event of the truth takes the best of the lines with the same words; what is said too much counts against it.
fn dense(truth: &str, said: &str) -> f64 {
    let lines = |text: &str| -> Vec<([f64; 2], String)> {
        text.lines()
            .filter_map(|line| {
                let (times, words) = line.rsplit_once(']')?;
                let words = words.trim_start_matches("<|clip_time_end|>");
                Some((interval(times)?, normalise(words)))
            })
            .collect()
    };
    let (truth, said) = (lines(truth), lines(said));
    let best = |(times, words): &([f64; 2], String)| {
        said.iter().filter(|line| line.1 == *words).map(|line| overlap(*times, line.0)).fold(0.0, f64::max)
    };
    let most = truth.len().max(said.len()).max(1);
    truth.iter().map(best).sum::<f64>() / most as f64
}

/// The share of lines whose point is at most a tenth of the picture off, across and down; what is said too much counts against it.
fn points(truth: &str, said: &str) -> f64 {
    let lines = |text: &str| -> Vec<(String, [i32; 2])> {
        text.lines()
            .filter_map(|line| {
                let (words, point) = line.trim().strip_suffix(']')?.rsplit_once('[')?;
                let (x, y) = point.split_once(',')?;
                Some((normalise(words), [x.trim().parse().ok()?, y.trim().parse().ok()?]))
            })
            .collect()
    };
    let (truth, mut said) = (lines(truth), lines(said));
    let most = truth.len().max(said.len()).max(1);
    let mut right = 0;
    for (words, point) in truth {
        let near =
            |line: &(String, [i32; 2])| line.0 == words && (0..2).all(|axis| (line.1[axis].abs_diff(point[axis])) <= 1);
        if let Some(at) = said.iter().position(near) {
            said.swap_remove(at);
            right += 1;
        }
    }
    f64::from(right) / most as f64
}

#[cfg(test)]
mod tests {
    use keye_world::{Split, World};

    use super::*;

    fn turn(task: Task, answer: &str) -> Turn {
        Turn { task, question: String::new(), answer: answer.into(), chance: 0.0 }
    }

    fn of(task: Task, truth: &str, answer: &str) -> f64 {
        score(&turn(task, truth), &World::new(Split::Test).clip(0).story, answer)
    }

    #[test]
    fn the_truth_scores_one() {
        for task in Task::every() {
            for index in 0..20 {
                let sample = World::new(Split::Test).question(task, index);
                let turn = &sample.turns[0];
                assert_eq!(score(turn, &sample.story, &turn.answer), 1.0, "{turn:?}");
                assert!(exact(turn, &turn.answer));
                assert!(score(turn, &sample.story, "") <= f64::from(sample.story.things.is_empty()), "{turn:?}");
            }
        }
    }

    #[test]
    fn words_are_compared_without_their_dress() {
        assert_eq!(of(Task::Order, "red circle", "The red  circle."), 1.0);
        assert_eq!(of(Task::Count, "3", "Three"), 1.0);
        assert_eq!(of(Task::Count, "3", "33"), 0.0);
        assert_eq!(of(Task::Attribute, "red", "red circle"), 0.0);
        assert_eq!(of(Task::Choice, "B", "b. green"), 1.0);
        assert_eq!(of(Task::Choice, "B", "Blue"), 0.0);
    }

    #[test]
    fn times_score_by_their_overlap() {
        let truth = "<|clip_time_start|>[1.0, 3.0]<|clip_time_end|>";
        assert_eq!(of(Task::When, truth, "[2.0, 4.0]"), 1.0 / 3.0);
        assert_eq!(of(Task::When, truth, "from 1 to 3 seconds"), 1.0);
        assert_eq!(of(Task::When, truth, "[3.0, 1.0]"), 0.0);
        assert_eq!(of(Task::When, truth, "soon"), 0.0);
        assert_eq!(of(Task::When, truth, "[4.0, 5.0]"), 0.0);
    }

    #[test]
    fn reading_counts_wrong_letters() {
        assert_eq!(of(Task::Reading, "HELLO", "hello"), 1.0);
        assert_eq!(of(Task::Reading, "HELLO", "HALLO"), 0.8);
        assert_eq!(of(Task::Reading, "12", "1"), 0.5);
    }

    #[test]
    fn dense_captions_lose_for_what_is_missing_and_for_what_is_made_up() {
        let truth = "<|clip_time_start|>[0.0, 2.0]<|clip_time_end|> red ring\n<|clip_time_start|>[1.0, 2.0]<|clip_time_end|> text A";
        assert_eq!(of(Task::DenseCaption, truth, "[0.0, 2.0] red ring"), 0.5);
        assert_eq!(of(Task::DenseCaption, truth, "[0.0, 1.0] a red ring\n[1.0, 2.0] text A"), 0.75);
        let more = format!("{truth}\n[0.0, 1.0] blue ring\n[0.0, 1.0] pink ring");
        assert_eq!(of(Task::DenseCaption, truth, &more), 0.5);
    }

    #[test]
    fn points_may_be_a_tenth_off() {
        assert_eq!(of(Task::Point, "[3,7]", "[4,6]"), 1.0);
        assert_eq!(of(Task::Point, "[3,7]", "[5,7]"), 0.0);
        assert_eq!(of(Task::Point, "0.0 [3,7]\n0.5 [4,7]", "0.0 [3,7]\n1.0 [4,7]"), 0.5);
        assert_eq!(of(Task::Point, "[3,7]", "[3,7]\n[3,7]"), 0.5);
        assert_eq!(of(Task::Point, "[3,7]", "[3,2147483648]"), 0.0);
        assert_eq!(of(Task::Point, "[3,7]", "[3,-2147483648]"), 0.0);
    }

    #[test]
    fn captions_score_by_the_things_named() {
        let sample = World::new(Split::Test).clip(3);
        let first = &sample.story.things[0];
        let turn = turn(Task::Caption, "");
        let only = format!("A {} {}.", first.colour.word(), first.shape.word());
        let things: BTreeSet<_> = sample.story.things.iter().map(|thing| (thing.colour, thing.shape)).collect();
        assert_eq!(score(&turn, &sample.story, &only), 2.0 / (1 + things.len()) as f64);
    }
}
