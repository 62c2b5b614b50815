//! Stories in words.

use crate::story::{BEAT, Property, Story, Thing, seconds};
use crate::wording::{capital, full_name};
use crate::{Motion, Size};

/// What turns into what, "turns blue", "grows".
fn change_words(to: Property) -> String {
    match to {
        Property::Colour(colour) => format!("turns {}", colour.word()),
        Property::Shape(shape) => format!("becomes a {}", shape.word()),
        Property::Size(Size::Large) => "grows".into(),
        Property::Size(Size::Small) => "shrinks".into(),
    }
}

fn motion_words(motion: Motion) -> &'static str {
    match motion {
        Motion::Still => "stays",
        Motion::Left => "moves left",
        Motion::Right => "moves right",
        Motion::Up => "moves up",
        Motion::Down => "moves down",
        Motion::Circling => "moves in a circle",
    }
}

fn place_words(story: &Story, thing: &Thing, frame: u32) -> &'static str {
    story.place(thing, frame).map_or("picture", |place| place.word())
}

/// Indices of the things in the order in which they come; those that come together, from the left and from above.
fn in_order(story: &Story) -> Vec<usize> {
    let mut order: Vec<usize> = (0..story.things.len()).collect();
    order.sort_by_key(|i| {
        let thing = &story.things[*i];
        (thing.from, story.place(thing, thing.from), *i)
    });
    order
}

/// All that is seen, in a sentence for each thing.
pub fn caption(story: &Story) -> String {
    let mut sentences = Vec::new();
    let order = in_order(story);
    for (number, scene) in story.scenes.iter().enumerate() {
        let opening = if number == 0 { "The background is" } else { "After a cut the background is" };
        sentences.push(format!("{opening} {}.", scene.background.word()));
        for &index in order.iter().filter(|i| story.scene_at(story.things[**i].from) == number) {
            sentences.push(capital(&thing_sentence(story, index)));
        }
    }
    if let Some(label) = &story.label {
        sentences.push(format!("The text reads {}.", label.text));
    }
    sentences.join(" ")
}

fn thing_sentence(story: &Story, index: usize) -> String {
    let thing = &story.things[index];
    let mut parts = Vec::new();
    let place = place_words(story, thing, thing.from);
    let appears = story.appears(thing);
    match (appears, thing.moves()) {
        (false, false) => parts.push(format!("is at the {place}")),
        (true, _) => parts.push(format!("appears at the {place}")),
        (false, true) => {}
    }
    if thing.moves() {
        parts.push(motion_words(thing.motion).into());
    }
    if let Some(contact) = story.contact.filter(|contact| contact.mover == index) {
        parts.push(format!("hits the {}", full_name(&story.things[contact.hit])));
    }
    if let Some(change) = thing.change {
        parts.push(change_words(change.to));
    }
    if story.vanishes(thing) {
        parts.push("vanishes".into());
    }
    format!("a {} {}.", full_name(thing), parts.join(" and "))
}

/// Something that happens: first frame, first frame after it, what.
pub(crate) fn events(story: &Story) -> Vec<(u32, u32, String)> {
    let mut events = Vec::new();
    for (number, scene) in story.scenes.iter().enumerate() {
        events.push((scene.from, story.scene_end(number), format!("{} background", scene.background.word())));
    }
    for index in in_order(story) {
        let thing = &story.things[index];
        let name = full_name(thing);
        let begins = place_words(story, thing, thing.from);
        events.push((thing.from, thing.until, format!("{name} at the {begins}")));
        if thing.moves() {
            let ends = place_words(story, thing, thing.until - 1);
            let what = format!("{name} {} to the {ends}", motion_words(thing.motion));
            events.push((thing.moving[0], thing.moving[1], what));
        }
        if let Some(change) = thing.change {
            events.push((change.at, thing.until, format!("{name} {}", change_words(change.to))));
        }
    }
    if let Some(contact) = story.contact {
        let [mover, hit] = [contact.mover, contact.hit].map(|index| full_name(&story.things[index]));
        events.push((contact.at, (contact.at + BEAT).min(story.frames), format!("{mover} hits {hit}")));
    }
    if let Some(label) = &story.label {
        events.push((label.from, label.until, format!("text {}", label.text)));
    }
    events
}

/// All that happens, a line each with its times, in the order of time.
pub fn dense_caption(story: &Story) -> String {
    let mut events = events(story);
    events.sort_by_key(|(from, until, _)| (*from, u32::MAX - until));
    let lines: Vec<String> =
        events.into_iter().map(|(from, until, what)| format!("{} {what}", interval(from, until))).collect();
    lines.join("\n")
}

/// A time span as the models write it (`docs/spec/training.md` §1.4).
pub(crate) fn interval(from: u32, until: u32) -> String {
    format!("<|clip_time_start|>[{}, {}]<|clip_time_end|>", seconds(from), seconds(until))
}

/// What happens, for readers who do not see it: everything that can be asked follows from it.
pub(crate) fn told(story: &Story) -> String {
    let mut events = events(story);
    events.sort_by_key(|(from, until, _)| (*from, u32::MAX - until));
    let line = |(from, until, what): (u32, u32, String)| match story.is_still() {
        true => format!("{}.", capital(&what)),
        false => format!("{} to {}: {what}.", seconds(from), seconds(until)),
    };
    events.into_iter().map(line).collect::<Vec<_>>().join("\n")
}
