//! Stories in words.

use crate::story::{BEAT, Property, Story, Thing, UNIT, seconds};
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
type Event = (u32, u32, String);

fn events(story: &Story) -> Vec<Event> {
    let mut events = Vec::new();
    for (number, scene) in story.scenes.iter().enumerate() {
        events.push((scene.from, story.scene_end(number), format!("{} background", scene.background.word())));
    }
    events.extend(in_order(story).into_iter().flat_map(|index| thing_events(story, index)));
    events.extend(contact_event(story));
    if let Some(label) = &story.label {
        events.push((label.from, label.until, format!("text {}", label.text)));
    }
    events
}

fn thing_events(story: &Story, index: usize) -> Vec<Event> {
    let thing = &story.things[index];
    let name = full_name(thing);
    let begins = place_words(story, thing, thing.from);
    let mut events = vec![(thing.from, thing.until, format!("{name} at the {begins}"))];
    if thing.moves() {
        let ends = place_words(story, thing, thing.until - 1);
        let what = format!("{name} {} to the {ends}", motion_words(thing.motion));
        events.push((thing.moving[0], thing.moving[1], what));
    }
    if let Some(change) = thing.change {
        events.push((change.at, thing.until, format!("{name} {}", change_words(change.to))));
    }
    events
}

fn contact_event(story: &Story) -> Option<Event> {
    let contact = story.contact?;
    let [mover, hit] = [contact.mover, contact.hit].map(|index| full_name(&story.things[index]));
    Some((contact.at, (contact.at + BEAT).min(story.frames), format!("{mover} hits {hit}")))
}

/// In the order of time, what lasts longer first.
fn by_time(mut events: Vec<Event>) -> Vec<Event> {
    events.sort_by_key(|(from, until, _)| (*from, u32::MAX - until));
    events
}

fn lines(events: Vec<Event>) -> String {
    let line = |(from, until, what)| format!("{} {what}", interval(from, until));
    by_time(events).into_iter().map(line).collect::<Vec<String>>().join("\n")
}

/// All that happens, a line each with its times, in the order of time.
pub fn dense_caption(story: &Story) -> String {
    lines(events(story))
}

/// What one thing does: its lines of the dense caption; of a still, its sentence.
pub(crate) fn course(story: &Story, index: usize) -> String {
    if story.is_still() {
        return capital(&thing_sentence(story, index));
    }
    let mut events = thing_events(story, index);
    events.extend(contact_event(story).filter(|_| story.contact.is_some_and(|contact| contact.mover == index)));
    lines(events)
}

/// Where a thing is at a frame, in tenths of the picture's width and height: "[3,7]".
pub(crate) fn point(story: &Story, thing: &Thing, frame: u32) -> Option<String> {
    let [x, y] = thing.at(frame)?.centre;
    let tenth = |at: i32, size: u32| (at * 10 / (size as i32 * UNIT)).clamp(0, 9);
    Some(format!("[{},{}]", tenth(x, story.width), tenth(y, story.height)))
}

/// All things with the points where they come in, a line each, in the order of captions.
pub(crate) fn points(story: &Story) -> String {
    let line = |index: usize| {
        let thing = &story.things[index];
        Some(format!("{} {}", full_name(thing), point(story, thing, thing.from)?))
    };
    in_order(story).into_iter().filter_map(line).collect::<Vec<_>>().join("\n")
}

/// Where a thing is every half second while it is there, a line each.
pub(crate) fn track(story: &Story, thing: &Thing) -> String {
    let line = |frame: u32| Some(format!("{} {}", seconds(frame), point(story, thing, frame)?));
    (thing.from..thing.until).step_by(BEAT as usize).filter_map(line).collect::<Vec<_>>().join("\n")
}

/// A time span as the models write it (`docs/spec/training.md` §1.4).
pub(crate) fn interval(from: u32, until: u32) -> String {
    format!("<|clip_time_start|>[{}, {}]<|clip_time_end|>", seconds(from), seconds(until))
}

/// What happens, for readers who do not see it: everything that can be asked follows from it.
pub(crate) fn told(story: &Story) -> String {
    let line = |(from, until, what): (u32, u32, String)| match story.is_still() {
        true => format!("{}.", capital(&what)),
        false => format!("{} to {}: {what}.", seconds(from), seconds(until)),
    };
    by_time(events(story)).into_iter().map(line).collect::<Vec<_>>().join("\n")
}
