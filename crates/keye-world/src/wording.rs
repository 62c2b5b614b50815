//! How things are named, and phrases with places to fill.

use crate::story::Property;
use crate::{Colour, Rng, Shape, Size, Story, Thing};

/// A property that a name leaves out, because it is asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Without {
    Nothing,
    Colour,
    Shape,
    Size,
}

#[derive(Clone, Copy)]
struct Name {
    size: Option<Size>,
    colour: Option<Colour>,
    shape: Option<Shape>,
}

impl Name {
    fn of(thing: &Thing, size: bool, colour: bool, shape: bool) -> Self {
        Self {
            size: size.then_some(thing.size),
            colour: colour.then_some(thing.colour),
            shape: shape.then_some(thing.shape),
        }
    }

    /// Whether it fits a thing at any time.
    fn fits(&self, thing: &Thing) -> bool {
        looks(thing).iter().any(|&(colour, shape, size)| {
            self.colour.is_none_or(|named| named == colour)
                && self.shape.is_none_or(|named| named == shape)
                && self.size.is_none_or(|named| named == size)
        })
    }

    fn text(&self) -> String {
        let words =
            [self.size.map(Size::word), self.colour.map(Colour::word), Some(self.shape.map_or("thing", Shape::word))];
        words.into_iter().flatten().collect::<Vec<_>>().join(" ")
    }
}

/// What a thing looks like, before and after it changes.
pub(crate) fn looks(thing: &Thing) -> Vec<(Colour, Shape, Size)> {
    let first = (thing.colour, thing.shape, thing.size);
    let mut looks = vec![first];
    match thing.change.map(|change| change.to) {
        Some(Property::Colour(to)) => looks.push((to, first.1, first.2)),
        Some(Property::Shape(to)) => looks.push((first.0, to, first.2)),
        Some(Property::Size(to)) => looks.push((first.0, first.1, to)),
        None => {}
    }
    looks
}

/// A name that fits one thing of the story only, "red circle"; `None` when there is none.
pub(crate) fn name(rng: &mut Rng, story: &Story, index: usize, without: Without) -> Option<String> {
    let thing = &story.things[index];
    let unique = |name: &Name| story.things.iter().enumerate().all(|(i, other)| i == index || !name.fits(other));
    let usual: &[(bool, bool, bool)] = match rng.below(6) {
        0 => {
            &[(false, false, true), (false, true, true), (true, true, true), (true, false, true), (false, true, false)]
        }
        1 => &[(true, true, true), (false, true, true), (true, false, true), (false, true, false)],
        _ => {
            &[(false, true, true), (true, true, true), (true, false, true), (false, true, false), (false, false, true)]
        }
    };
    usual
        .iter()
        .map(|&(size, colour, shape)| {
            Name::of(
                thing,
                size && without != Without::Size,
                colour && without != Without::Colour,
                shape && without != Without::Shape,
            )
        })
        .filter(|name| name.colour.is_some() || name.shape.is_some() || name.size.is_some())
        .find(unique)
        .map(|name| name.text())
}

impl Story {
    /// The one thing that these words name, as it looks at any time ("red circle", "large thing"): its index; `None` if they
    /// are no name, or fit several.
    pub fn named(&self, words: &str) -> Option<usize> {
        let fits = |thing: &Thing| {
            looks(thing).into_iter().any(|(colour, shape, size)| {
                (1..8).any(|parts: u32| {
                    let part = |bit: u32| parts >> bit & 1 == 1;
                    let name = Name {
                        size: part(0).then_some(size),
                        colour: part(1).then_some(colour),
                        shape: part(2).then_some(shape),
                    };
                    name.text() == words
                })
            })
        };
        let mut named = (0..self.things.len()).filter(|index| fits(&self.things[*index]));
        let first = named.next()?;
        named.next().is_none().then_some(first)
    }
}

/// "large red circle", as it first looks.
pub(crate) fn full_name(thing: &Thing) -> String {
    Name::of(thing, true, true, true).text()
}

/// One of the phrases with each `{}` replaced by the next of `parts`.
pub(crate) fn phrase(rng: &mut Rng, phrases: &[&str], parts: &[&str]) -> String {
    let mut parts = parts.iter();
    let mut pieces = rng.pick(phrases).split("{}");
    let mut text = pieces.next().unwrap_or_default().to_owned();
    for piece in pieces {
        text.push_str(parts.next().copied().unwrap_or_default());
        text.push_str(piece);
    }
    text
}

/// With a capital letter in front.
pub(crate) fn capital(text: &str) -> String {
    let mut letters = text.chars();
    letters.next().map(|first| first.to_ascii_uppercase().to_string() + letters.as_str()).unwrap_or_default()
}
