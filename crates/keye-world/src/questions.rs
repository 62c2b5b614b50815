//! Questions about a story, with their answers.

use crate::captions::{caption, course, dense_caption, interval, point, points, track};
use crate::story::{Property, UNIT};
use crate::wording::{Without, full_name, looks, name, phrase};
use crate::{Background, Colour, Place, Rng, Shape, Size, Story, Task, Thing, Turn};

/// A question of this kind, if the story has an answer to one.
pub(crate) fn ask(rng: &mut Rng, story: &Story, task: Task) -> Option<Turn> {
    let (question, answer, chance) = match task {
        Task::Caption => {
            let phrases = ["Describe what you see.", "What is shown here?", "Write a caption."];
            (phrase(rng, &phrases, &[]), caption(story), 0.0)
        }
        Task::DenseCaption if story.is_still() => return None,
        Task::DenseCaption => {
            let phrases =
                ["Describe the clip with times.", "What happens, and when?", "List the events with their times."];
            (phrase(rng, &phrases, &[]), dense_caption(story), 0.0)
        }
        Task::Attribute => attribute(rng, story)?,
        Task::Where => place(rng, story)?,
        Task::Motion => motion(rng, story)?,
        Task::Count => count(rng, story)?,
        Task::Order => order(rng, story)?,
        Task::When => when(rng, story)?,
        Task::Change => change(rng, story)?,
        Task::Contact => contact(rng, story)?,
        Task::Scene => scene(rng, story)?,
        Task::Reading => {
            let label = story.label.as_ref()?;
            let phrases = ["What does the text say?", "Read the text.", "Which letters or digits are shown?"];
            (phrase(rng, &phrases, &[]), label.text.clone(), 0.0)
        }
        Task::Compare => compare(rng, story)?,
        Task::Choice => choice(rng, story)?,
        Task::Trap => trap(rng, story)?,
        Task::Follow => follow(rng, story)?,
        Task::Point => pointed(rng, story)?,
    };
    Some(Turn { task, question, answer, chance })
}

type Asked = Option<(String, String, f32)>;

/// Indices of the things in any order; the first thing, which is the point of a test story, comes first more often.
fn things(rng: &mut Rng, story: &Story) -> Vec<usize> {
    let mut order: Vec<usize> = (0..story.things.len()).collect();
    rng.shuffle(&mut order);
    if rng.chance(1, 2) {
        order.sort_by_key(|i| *i != 0);
    }
    order
}

fn changes(thing: &Thing, what: fn(&Property) -> bool) -> bool {
    thing.change.is_some_and(|change| what(&change.to))
}

fn attribute(rng: &mut Rng, story: &Story) -> Asked {
    for index in things(rng, story) {
        let thing = &story.things[index];
        let kind = rng.below(5);
        let asked = match kind {
            0 | 1 if !changes(thing, |to| matches!(to, Property::Colour(_))) => {
                let phrases =
                    ["What colour is the {}?", "Which colour does the {} have?", "Name the colour of the {}."];
                name(rng, story, index, Without::Colour)
                    .map(|name| (phrase(rng, &phrases, &[&name]), thing.colour.word(), 8))
            }
            2 | 3 if !changes(thing, |to| matches!(to, Property::Shape(_))) => {
                let phrases = ["What shape is the {}?", "Which shape does the {} have?", "Name the shape of the {}."];
                name(rng, story, index, Without::Shape)
                    .map(|name| (phrase(rng, &phrases, &[&name]), thing.shape.word(), 6))
            }
            4 if !changes(thing, |to| matches!(to, Property::Size(_))) => {
                let phrases = ["Is the {} small or large?", "How large is the {}?", "What size is the {}?"];
                name(rng, story, index, Without::Size)
                    .map(|name| (phrase(rng, &phrases, &[&name]), thing.size.word(), 2))
            }
            _ => None,
        };
        if let Some((question, answer, options)) = asked {
            return Some((question, answer.into(), 1.0 / options as f32));
        }
    }
    None
}

/// Whether a point is clearly in its third of the picture.
fn clearly_placed(story: &Story, thing: &Thing, frame: u32) -> bool {
    let Some(look) = thing.at(frame) else { return false };
    [story.width, story.height].into_iter().enumerate().all(|(axis, size)| {
        let size = size as i32 * UNIT;
        [size / 3, size * 2 / 3].iter().all(|line| (look.centre[axis] - line).abs() >= 5 * UNIT)
    })
}

fn place(rng: &mut Rng, story: &Story) -> Asked {
    for index in things(rng, story) {
        let thing = &story.things[index];
        let at_end = rng.chance(1, 2);
        let (frame, phrases) = match (thing.moves(), at_end) {
            (false, _) => {
                (thing.from, ["Where is the {}?", "In which part of the picture is the {}?", "Locate the {}."])
            }
            (true, false) => {
                (thing.from, ["Where is the {} at first?", "Where does the {} start?", "Where is the {} at the start?"])
            }
            (true, true) => (
                thing.until - 1,
                ["Where is the {} in the end?", "Where does the {} end up?", "Where is the {} at last?"],
            ),
        };
        if !clearly_placed(story, thing, frame) {
            continue;
        }
        if let (Some(place), Some(name)) = (story.place(thing, frame), name(rng, story, index, Without::Nothing)) {
            return Some((phrase(rng, &phrases, &[&name]), place.word().into(), 1.0 / 9.0));
        }
    }
    None
}

/// Answers to [`Task::Motion`].
const MOTIONS: [&str; 6] = ["it does not move", "left", "right", "up", "down", "in a circle"];

fn motion(rng: &mut Rng, story: &Story) -> Asked {
    if story.is_still() {
        return None;
    }
    let mut order = things(rng, story);
    // What moves is asked about more often than what does not.
    if rng.chance(3, 4) {
        order.sort_by_key(|index| !story.things[*index].moves());
    }
    for index in order.into_iter().filter(|index| story.things[*index].rebound.is_none()) {
        if let Some(name) = name(rng, story, index, Without::Nothing) {
            let phrases = ["Which way does the {} move?", "How does the {} move?", "Where is the {} going?"];
            let answer = MOTIONS[story.things[index].motion as usize];
            return Some((phrase(rng, &phrases, &[&name]), answer.into(), 1.0 / 6.0));
        }
    }
    None
}

fn count(rng: &mut Rng, story: &Story) -> Asked {
    if story.scenes.len() > 1 {
        return None;
    }
    let things = &story.things;
    let (question, number) = match rng.below(5) {
        0 => {
            let phrases = ["How many things are there in all?", "Count all things.", "How many things are shown?"];
            (phrase(rng, &phrases, &[]), things.len())
        }
        1 => {
            let colour = rng.pick(things.get(..).filter(|list| !list.is_empty())?).colour;
            if things.iter().any(|thing| changes(thing, |to| matches!(to, Property::Colour(_)))) {
                return None;
            }
            let phrases = ["How many {} things are there?", "Count the {} things.", "How many things are {}?"];
            (phrase(rng, &phrases, &[colour.word()]), things.iter().filter(|thing| thing.colour == colour).count())
        }
        2 if !story.is_still() => {
            let phrases = ["How many things move?", "Count the things that move.", "How many things are moving?"];
            (phrase(rng, &phrases, &[]), things.iter().filter(|thing| thing.moves()).count())
        }
        3 if !story.is_still() => {
            let phrases = ["How many things are there in the end?", "Count the things in the last frame."];
            (phrase(rng, &phrases, &[]), things.iter().filter(|thing| thing.at(story.frames - 1).is_some()).count())
        }
        _ => {
            let shape = rng.pick(things.get(..).filter(|list| !list.is_empty())?).shape;
            if things.iter().any(|thing| changes(thing, |to| matches!(to, Property::Shape(_)))) {
                return None;
            }
            let phrases = ["How many {} are there?", "Count the {}.", "How many {} do you see?"];
            (phrase(rng, &phrases, &[shape.plural()]), things.iter().filter(|thing| thing.shape == shape).count())
        }
    };
    Some((question, number.to_string(), 1.0 / 6.0))
}

/// Names of two things, in any order.
fn pair(
    rng: &mut Rng,
    story: &Story,
    fits: impl Fn(&Thing, &Thing) -> bool,
    without: Without,
) -> Option<[(usize, String); 2]> {
    let order = things(rng, story);
    for (at, &one) in order.iter().enumerate() {
        for &two in &order[at + 1..] {
            if !fits(&story.things[one], &story.things[two]) {
                continue;
            }
            if let (Some(a), Some(b)) = (name(rng, story, one, without), name(rng, story, two, without)) {
                let mut pair = [(one, a), (two, b)];
                rng.shuffle(&mut pair);
                return Some(pair);
            }
        }
    }
    None
}

fn order(rng: &mut Rng, story: &Story) -> Asked {
    if story.is_still() {
        return None;
    }
    let kind = rng.below(3);
    let phrases = match kind {
        0 => ["Which appears first, the {} or the {}?", "What comes first, the {} or the {}?"],
        1 => ["Which vanishes first, the {} or the {}?", "What goes first, the {} or the {}?"],
        _ => ["Which moves first, the {} or the {}?", "What starts to move first, the {} or the {}?"],
    };
    // The frame that counts; the clip's end for what never happens.
    let time = |thing: &Thing| match kind {
        0 => thing.from,
        1 => thing.until,
        _ if thing.moves() => thing.moving[0],
        _ => story.frames,
    };
    let fits = |a: &Thing, b: &Thing| {
        let happens = [a, b].map(|thing| time(thing) < story.frames);
        // What stays certainly goes later than what goes.
        time(a) != time(b) && (happens == [true; 2] || kind == 1)
    };
    let pair = pair(rng, story, fits, Without::Nothing)?;
    let first = pair.iter().min_by_key(|(index, _)| time(&story.things[*index]))?;
    Some((phrase(rng, &phrases, &[&pair[0].1, &pair[1].1]), first.1.clone(), 0.5))
}

fn when(rng: &mut Rng, story: &Story) -> Asked {
    if story.is_still() {
        return None;
    }
    let mut asked: Vec<(String, [u32; 2])> = Vec::new();
    for index in things(rng, story) {
        let thing = &story.things[index];
        let Some(name) = name(rng, story, index, Without::Nothing) else { continue };
        if thing.from > 0 || thing.until < story.frames {
            let phrases = ["When is the {} visible?", "From when to when is the {} there?", "When can the {} be seen?"];
            asked.push((phrase(rng, &phrases, &[&name]), [thing.from, thing.until]));
        }
        if thing.moves() && thing.moving != [0, story.frames] {
            let phrases = ["When does the {} move?", "From when to when does the {} move?", "When is the {} moving?"];
            asked.push((phrase(rng, &phrases, &[&name]), thing.moving));
        }
    }
    if let Some(label) = story.label.as_ref().filter(|label| label.from > 0 || label.until < story.frames) {
        let phrases = ["When is the text visible?", "From when to when is the text there?"];
        asked.push((phrase(rng, &phrases, &[]), [label.from, label.until]));
    }
    if asked.is_empty() {
        return None;
    }
    let (question, [from, until]) = rng.pick(&asked).clone();
    Some((question, interval(from, until), (until - from) as f32 / story.frames as f32))
}

fn change(rng: &mut Rng, story: &Story) -> Asked {
    let (index, change) = story.things.iter().enumerate().find_map(|(i, thing)| Some((i, thing.change?)))?;
    let name = name(rng, story, index, Without::Nothing)?;
    let (phrases, answer, options): (&[&str], &str, u32) = match change.to {
        Property::Colour(to) => (&["What colour does the {} become?", "Which colour does the {} turn?"], to.word(), 7),
        Property::Shape(to) => (&["What shape does the {} become?", "What does the {} turn into?"], to.word(), 5),
        Property::Size(Size::Large) => (&["Does the {} grow or shrink?"], "it grows", 2),
        Property::Size(Size::Small) => (&["Does the {} grow or shrink?"], "it shrinks", 2),
    };
    Some((phrase(rng, phrases, &[&name]), answer.into(), 1.0 / options as f32))
}

fn contact(rng: &mut Rng, story: &Story) -> Asked {
    if story.is_still() || story.scenes.len() > 1 {
        return None;
    }
    let asks = ["Does the {} hit the {}?", "Do the {} and the {} touch?"];
    if let Some(contact) = story.contact {
        let mover = name(rng, story, contact.mover, Without::Nothing)?;
        let hit = name(rng, story, contact.hit, Without::Nothing)?;
        if rng.chance(1, 2) {
            return Some((phrase(rng, &asks, &[&mover, &hit]), "yes".into(), 0.5));
        }
        let others = (story.things.len() - 1).max(1);
        return Some((
            phrase(rng, &["What does the {} hit?", "What is hit by the {}?"], &[&mover]),
            hit,
            1.0 / others as f32,
        ));
    }
    let [(_, mover), (_, other)] = pair(rng, story, |a, b| a.moves() || b.moves(), Without::Nothing)?;
    Some((phrase(rng, &asks, &[&mover, &other]), "no".into(), 0.5))
}

fn scene(rng: &mut Rng, story: &Story) -> Asked {
    if story.scenes.len() > 1 {
        let last = story.scenes.len() - 1;
        let (question, answer) = match rng.below(3) {
            0 => (phrase(rng, &["What colour is the background at first?", "Which background comes first?"], &[]), 0),
            1 => {
                (phrase(rng, &["What colour is the background in the end?", "Which background comes last?"], &[]), last)
            }
            _ => {
                let phrases = ["How many scenes are there?", "Count the scenes."];
                return Some((phrase(rng, &phrases, &[]), story.scenes.len().to_string(), 1.0 / 3.0));
            }
        };
        return Some((question, story.scenes[answer].background.word().into(), 1.0 / 3.0));
    }
    if !story.is_still() && rng.chance(1, 3) {
        return Some((phrase(rng, &["How many scenes are there?", "Count the scenes."], &[]), "1".into(), 1.0 / 3.0));
    }
    let phrases = ["What colour is the background?", "Name the colour of the background.", "Which background is it?"];
    Some((phrase(rng, &phrases, &[]), story.scenes[0].background.word().into(), 1.0 / Background::ALL.len() as f32))
}

fn compare(rng: &mut Rng, story: &Story) -> Asked {
    let steady = |thing: &Thing| thing.change.is_none();
    match rng.below(3) {
        0 => {
            let fits = |a: &Thing, b: &Thing| a.size != b.size && steady(a) && steady(b);
            let pair = pair(rng, story, fits, Without::Size)?;
            let (larger, phrases): (bool, &[&str]) = match rng.chance(1, 2) {
                true => (true, &["Which is larger, the {} or the {}?", "Which one is larger: the {} or the {}?"]),
                false => (false, &["Which is smaller, the {} or the {}?", "Which one is smaller: the {} or the {}?"]),
            };
            let right = pair.iter().find(|(index, _)| (story.things[*index].size == Size::Large) == larger)?;
            Some((phrase(rng, phrases, &[&pair[0].1, &pair[1].1]), right.1.clone(), 0.5))
        }
        1 => {
            let pair = pair(rng, story, |a, b| steady(a) && steady(b), Without::Colour)?;
            let [one, two] = [pair[0].0, pair[1].0].map(|index| story.things[index].colour);
            let phrases = ["Do the {} and the {} have the same colour?", "Are the {} and the {} of the same colour?"];
            let answer = if one == two { "yes" } else { "no" };
            Some((phrase(rng, &phrases, &[&pair[0].1, &pair[1].1]), answer.into(), 0.5))
        }
        _ => {
            if story.things.iter().any(|thing| !steady(thing)) {
                return None;
            }
            let [one, two] = [*rng.pick(Shape::ALL), *rng.pick(Shape::ALL)];
            let number = |shape| story.things.iter().filter(|thing| thing.shape == shape).count();
            let (a, b) = (number(one), number(two));
            if one == two || a + b == 0 {
                return None;
            }
            let answer = match a.cmp(&b) {
                std::cmp::Ordering::Greater => one.plural(),
                std::cmp::Ordering::Less => two.plural(),
                std::cmp::Ordering::Equal => "the same number",
            };
            let phrases = ["Are there more {} or {}?", "Of which are there more, {} or {}?"];
            Some((phrase(rng, &phrases, &[one.plural(), two.plural()]), answer.into(), 1.0 / 3.0))
        }
    }
}

fn choice(rng: &mut Rng, story: &Story) -> Asked {
    let task = *rng.pick(&[Task::Attribute, Task::Where, Task::Motion, Task::Count, Task::Change]);
    let base = ask(rng, story, task)?;
    let words = |all: &[&'static str]| all.iter().map(|word| (*word).to_owned()).collect::<Vec<String>>();
    let pools = [
        (task != Task::Where, Colour::ALL.iter().map(|c| c.word().to_owned()).collect::<Vec<_>>()),
        (task != Task::Where, Shape::ALL.iter().map(|s| s.word().to_owned()).collect()),
        (task == Task::Where, Place::ALL.iter().map(|p| p.word().to_owned()).collect()),
        (task == Task::Motion, words(&MOTIONS)),
        (task == Task::Count, (0..=6).map(|n| n.to_string()).collect()),
    ];
    let (_, mut options) = pools.into_iter().find(|(fits, pool)| *fits && pool.contains(&base.answer))?;
    options.retain(|option| *option != base.answer);
    rng.shuffle(&mut options);
    options.truncate(3);
    let right = rng.below(4) as usize;
    options.insert(right.min(options.len()), base.answer);
    let letters = ["A", "B", "C", "D"];
    let listed: Vec<String> =
        letters.iter().zip(&options).map(|(letter, option)| format!("{letter}. {option}")).collect();
    let close = phrase(rng, &["Answer with the letter.", "Which letter is right?", "Give the letter only."], &[]);
    Some((format!("{}\n{}\n{close}", base.question, listed.join("\n")), letters[right].into(), 0.25))
}

fn trap(rng: &mut Rng, story: &Story) -> Asked {
    let shown: Vec<(Colour, Shape, Size)> = story.things.iter().flat_map(looks).collect();
    let asks = ["Is there a {}?", "Do you see a {}?", "Can a {} be seen?"];
    if rng.chance(1, 4) {
        let absent: Vec<Shape> =
            Shape::ALL.iter().copied().filter(|shape| shown.iter().all(|look| look.1 != *shape)).collect();
        if absent.is_empty() {
            return None;
        }
        let shape = rng.pick(&absent).word();
        let phrases: &[&str] = match story.is_still() {
            true => &["What colour is the {}?", "Where is the {}?"],
            false => {
                &["What colour is the {}?", "Where is the {}?", "Which way does the {} move?", "When does the {} move?"]
            }
        };
        return Some((phrase(rng, phrases, &[shape]), format!("there is no {shape}"), 0.0));
    }
    if rng.chance(1, 2) {
        let thing = rng.pick(story.things.get(..).filter(|list| !list.is_empty())?);
        let full = full_name(thing);
        let short = full.split_once(' ').map_or("", |(_, rest)| rest);
        let words = if rng.chance(1, 4) { &full } else { short };
        return Some((phrase(rng, &asks, &[words]), "yes".into(), 0.5));
    }
    // Half right: a colour or a shape that is there, so that a look at one of the two does not do.
    let (mut colour, mut shape) = (*rng.pick(Colour::ALL), *rng.pick(Shape::ALL));
    if let Some((there, kind, _)) = shown.get(rng.below(shown.len().max(1) as u32) as usize) {
        if rng.chance(1, 2) {
            colour = *there;
        } else {
            shape = *kind;
        }
    }
    if shown.iter().any(|look| (look.0, look.1) == (colour, shape)) {
        return None;
    }
    Some((phrase(rng, &asks, &[&format!("{} {}", colour.word(), shape.word())]), "no".into(), 0.5))
}

fn follow(rng: &mut Rng, story: &Story) -> Asked {
    let index = *things(rng, story).first()?;
    let without = *rng.pick(&[Without::Nothing, Without::Colour, Without::Shape]);
    let name = name(rng, story, index, without)?;
    let phrases: &[&str] = match story.is_still() {
        true => &["Describe the {}.", "What is seen of the {}?"],
        false => &["Describe the {} with times.", "What does the {} do, and when?", "List the events of the {}."],
    };
    Some((phrase(rng, phrases, &[&name]), course(story, index), 0.0))
}

fn pointed(rng: &mut Rng, story: &Story) -> Asked {
    let index = *things(rng, story).first()?;
    let thing = &story.things[index];
    if story.is_still() && rng.chance(1, 2) {
        return Some((
            phrase(rng, &["List all things with their points.", "Point to all things."], &[]),
            points(story),
            0.0,
        ));
    }
    let name = name(rng, story, index, Without::Nothing)?;
    let (phrases, answer): (&[&str], Option<String>) = match (story.is_still(), rng.below(4)) {
        (true, _) => (&["Point to the {}."], point(story, thing, thing.from)),
        (false, 0) => {
            (&["Point to the {} at first.", "Point to the {} at the start."], point(story, thing, thing.from))
        }
        (false, 1) => {
            (&["Point to the {} in the end.", "Point to the {} at last."], point(story, thing, thing.until - 1))
        }
        (false, _) => (&["Point to the {} in each frame.", "List the points of the {}."], Some(track(story, thing))),
    };
    Some((phrase(rng, phrases, &[&name]), answer?, 0.0))
}
