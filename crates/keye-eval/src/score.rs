//! Answers against the truth, 0 to 1.

use std::collections::BTreeSet;

use keye_world::{Colour, Shape, Size, Story, Task, Turn};

/// Which rules of scoring these are: raised whenever an answer may score otherwise than before, so that reports of different
/// rules are not compared.
pub const SCORING: u32 = 2;

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
        _ => f64::from(exact(turn, story, answer)),
    }
}

/// Whether an answer is right: equal after [`normalise`]; the letter for choices; the same times; where a thing is asked for,
/// any name that fits it alone ("ring" or "blue ring", when there is no other ring).
pub fn exact(turn: &Turn, story: &Story, answer: &str) -> bool {
    match turn.task {
        Task::Choice => letter(answer) == letter(&turn.answer),
        Task::When => interval(answer).is_some() && interval(answer) == interval(&turn.answer),
        Task::Reading => letters(answer) == letters(&turn.answer),
        Task::Order | Task::Contact | Task::Compare => {
            let (truth, said) = (normalise(&turn.answer), normalise(answer));
            let names = |words: &str| story.named(&truth).is_some_and(|thing| story.named(words) == Some(thing));
            // "The large thing" is not seen but read out of a question which of two is larger.
            truth == said || names(&said) && (turn.task != Task::Compare || names(without_size(&said)))
        }
        _ => normalise(answer) == normalise(&turn.answer),
    }
}

/// "red circle" of "large red circle".
fn without_size(name: &str) -> &str {
    Size::ALL.iter().find_map(|size| name.strip_prefix(size.word())).unwrap_or(name).trim_start()
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

/// The letter A to D that an answer gives: the last one that stands alone before punctuation or the end ("B", "(b) green",
/// "a red thing, so C"), else the first one before a word ("B is right"). Small letters count in the first place only; an A
/// before a word other than "is" is the article.
fn letter(answer: &str) -> Option<char> {
    let (mut marked, mut plain) = (None, None);
    for (at, letter) in answer.match_indices(|c: char| matches!(c, 'A'..='D' | 'a'..='d')) {
        let (before, after) = (&answer[..at], &answer[at + letter.len()..]);
        if before.ends_with(char::is_alphanumeric) || after.starts_with(char::is_alphanumeric) {
            continue;
        }
        let letter = letter.chars().next().filter(|c| c.is_uppercase() || !before.contains(char::is_alphanumeric));
        let after = after.trim_start_matches(' ');
        if !after.starts_with(char::is_alphanumeric) {
            marked = letter.or(marked);
        } else if letter.is_some_and(|c| matches!(c, 'B'..='D') || c == 'A' && after.starts_with("is ")) {
            plain = plain.or(letter);
        }
    }
    marked.or(plain).map(|letter| letter.to_ascii_uppercase())
}

/// Letters and digits, capital.
fn letters(answer: &str) -> Vec<char> {
    answer.chars().filter(|c| c.is_alphanumeric()).map(|c| c.to_ascii_uppercase()).collect()
}

/// The first two times of a text, in order: seconds ("1.5"), or minutes and seconds ("1:02").
fn interval(text: &str) -> Option<[f64; 2]> {
    let word = |c: char| !c.is_ascii_digit() && !matches!(c, '.' | ':');
    let mut times = text.split(word).filter_map(|word| seconds(word.trim_matches(['.', ':'])));
    let [from, until] = [times.next()?, times.next()?];
    (from <= until).then_some([from, until])
}

/// 62 of "1:02".
fn seconds(time: &str) -> Option<f64> {
    time.split(':').try_fold(0.0, |sum, part| Some(60.0 * sum + part.parse::<f64>().ok()?))
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
    use keye_world::{Sample, Split, Thing, World};

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
                assert!(exact(turn, &sample.story, &turn.answer));
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
    }

    #[test]
    fn an_article_is_no_letter() {
        for (truth, answers) in [
            (
                "A",
                &[
                    "A",
                    "a",
                    "A.",
                    "a) red",
                    "A: red",
                    "A\nIt is red",
                    "A is right",
                    "**A**",
                    "The answer is A.",
                    "Not B, but A",
                ][..],
            ),
            ("B", &["b. green", "(b) green", "B green", "B is right, A is not", "[B]", "It is a ring: B", "b"]),
            ("C", &["A red thing, so C", "a red thing, so C", "A. red, B. blue, C. green: C", "A ring, C."]),
        ] {
            for answer in answers {
                assert_eq!(of(Task::Choice, truth, answer), 1.0, "{answer}");
            }
        }
        for answer in ["It is a blue circle", "A red thing", "a ring", "Blue", "it is a", "", "a d-shape", "Ä. A1"] {
            assert!(["A", "B", "C", "D"].iter().all(|truth| of(Task::Choice, truth, answer) == 0.0), "{answer}");
        }
    }

    #[test]
    fn a_thing_may_have_any_name_that_fits_it_alone() {
        let (mut fitting, mut ambiguous) = (0, 0);
        for index in 0..300 {
            let sample = World::new(Split::Test).question(Task::Contact, index);
            let (turn, story) = (&sample.turns[0], &sample.story);
            let yes_or_no = ["yes", "no"].contains(&turn.answer.as_str());
            let Some(contact) = story.contact.filter(|_| !yes_or_no) else { continue };
            if story.things.iter().any(|thing| thing.change.is_some()) {
                continue;
            }
            let hit = &story.things[contact.hit];
            let alike = |of: fn(&Thing, &Thing) -> bool| story.things.iter().filter(|other| of(hit, other)).count();
            let names = [
                (format!("The {}.", hit.shape.word()), alike(|a, b| a.shape == b.shape)),
                (format!("{} thing", hit.colour.word()), alike(|a, b| a.colour == b.colour)),
                (
                    format!("a {} {}", hit.size.word(), hit.shape.word()),
                    alike(|a, b| (a.size, a.shape) == (b.size, b.shape)),
                ),
            ];
            for (name, fits) in names {
                let right = fits == 1 || normalise(&name) == turn.answer;
                assert_eq!(score(turn, story, &name), f64::from(right), "{name}, {turn:?}");
                fitting += usize::from(right);
                ambiguous += usize::from(!right);
            }
            let mover = &story.things[contact.mover];
            let mover = format!("{} {} {}", mover.size.word(), mover.colour.word(), mover.shape.word());
            assert_eq!(score(turn, story, &mover), 0.0, "{mover}, {turn:?}");
        }
        assert!(fitting > 50 && ambiguous > 20, "{fitting}, {ambiguous}");
        // Where a property is asked for, a name of the thing is no answer.
        let asks = |sample: &Sample| sample.turns[0].question.starts_with("What shape is the");
        let sample = (0..).map(|index| World::new(Split::Test).question(Task::Attribute, index)).find(asks).unwrap();
        let turn = &sample.turns[0];
        let asked = turn.question.trim_start_matches("What shape is the ").trim_end_matches('?');
        assert!(sample.story.named(asked).is_some());
        assert_eq!(score(turn, &sample.story, asked), 0.0, "{turn:?}");
    }

    #[test]
    fn the_larger_one_is_named_by_more_than_its_size() {
        let mut checked = 0;
        for index in 0..100 {
            let sample = World::new(Split::Test).question(Task::Compare, index);
            let (turn, story) = (&sample.turns[0], &sample.story);
            let Some(thing) = story.named(&turn.answer).filter(|_| turn.question.contains("larger")) else { continue };
            for size in Size::ALL {
                assert_eq!(score(turn, story, &format!("the {} thing", size.word())), 0.0, "{turn:?}");
                let full = format!("The {} {}.", size.word(), turn.answer);
                assert_eq!(score(turn, story, &full), f64::from(*size == story.things[thing].size), "{full}, {turn:?}");
                checked += 1;
            }
        }
        assert!(checked > 20, "{checked}");
    }

    #[test]
    fn times_score_by_their_overlap() {
        let truth = "<|clip_time_start|>[1.0, 3.0]<|clip_time_end|>";
        assert_eq!(of(Task::When, truth, "[2.0, 4.0]"), 1.0 / 3.0);
        for same in ["from 1 to 3 seconds", "It is there from 1.0 to 3.0.", "1.0-3.0", "1-3s.", "Times: 0:01 to 0:03."]
        {
            assert_eq!(of(Task::When, truth, same), 1.0, "{same}");
        }
        let minutes = "<|clip_time_start|>[1.0, 62.0]<|clip_time_end|>";
        assert_eq!(of(Task::When, minutes, "from 0:01.0 to 1:02"), 1.0);
        assert_eq!(of(Task::When, minutes, "at 1:02"), 0.0);
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
