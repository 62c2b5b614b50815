//! Stories from a seed.

use crate::font;
use crate::story::{BEAT, Property, UNIT};
use crate::{Background, Change, Colour, Contact, Label, Motion, Place, Rng, Scene, Shape, Size, Split, Story, Thing};

/// What a clip is mainly about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Emphasis {
    /// Several things that stay.
    Gallery,
    /// Things that come and go.
    Arrivals,
    /// Things that move.
    Motion,
    /// A thing that turns into another.
    Change,
    /// A thing that hits another.
    Contact,
    /// Two or three scenes.
    Cut,
    /// Letters and digits.
    Letters,
}

impl Emphasis {
    pub(crate) const ALL: [Self; 7] =
        [Self::Gallery, Self::Arrivals, Self::Motion, Self::Change, Self::Contact, Self::Cut, Self::Letters];
}

/// Most things of a story.
const MOST: u32 = 6;
/// Pixels between things that do not touch.
const GAP: i32 = 2;
/// How often a place is looked for before a thing is given up.
const TRIES: u32 = 24;

/// Sizes of pictures and how many of ten have each: 16 or 15 tokens of 28x28 pixels.
const SIZES: [([u32; 2], u32); 3] = [([112, 112], 6), ([140, 84], 2), ([84, 140], 2)];

/// A story; with `still`, of one frame, in which nothing happens.
pub(crate) fn compose(rng: &mut Rng, split: Split, emphasis: Emphasis, still: bool) -> Story {
    let mut draw = rng.below(10);
    let [width, height] = SIZES
        .iter()
        .find_map(|(size, share)| match draw < *share {
            true => Some(*size),
            false => {
                draw -= share;
                None
            }
        })
        .unwrap_or(SIZES[0].0);
    let beats = if rng.chance(1, 4) { rng.range(10, 16) } else { rng.range(4, 10) };
    let beats = if emphasis == Emphasis::Cut { beats.max(6) } else { beats };
    let frames = if still { 1 } else { beats * BEAT };
    let scenes = scenes(rng, emphasis, frames);
    let story = Story { width, height, frames, scenes, things: Vec::new(), label: None, contact: None };
    let palette = Palette::new(rng);
    let mut composer = Composer { rng, split, still, story, palette };
    composer.fill(emphasis);
    composer.story
}

fn scenes(rng: &mut Rng, emphasis: Emphasis, frames: u32) -> Vec<Scene> {
    let mut backgrounds = Background::ALL.to_vec();
    rng.shuffle(&mut backgrounds);
    let first = Scene { from: 0, background: backgrounds[0] };
    if emphasis != Emphasis::Cut || frames == 1 {
        return vec![first];
    }
    let beats = frames / BEAT;
    let mut scenes = vec![first];
    if beats >= 12 && rng.chance(1, 3) {
        let [one, two] = [rng.range(4, beats / 2), rng.range(beats / 2 + 2, beats - 3)];
        scenes.push(Scene { from: one * BEAT, background: backgrounds[1] });
        scenes.push(Scene { from: two * BEAT, background: backgrounds[2] });
    } else {
        scenes.push(Scene { from: rng.range(3, beats - 3) * BEAT, background: backgrounds[1] });
    }
    scenes
}

/// The kinds of things of one story: few, so that some come twice, or all.
struct Palette {
    colours: Vec<Colour>,
    shapes: Vec<Shape>,
}

impl Palette {
    fn new(rng: &mut Rng) -> Self {
        let (mut colours, mut shapes) = (Colour::ALL.to_vec(), Shape::ALL.to_vec());
        rng.shuffle(&mut colours);
        rng.shuffle(&mut shapes);
        if rng.chance(1, 3) {
            colours.truncate(3);
            shapes.truncate(2);
        }
        Self { colours, shapes }
    }
}

struct Composer<'a> {
    rng: &'a mut Rng,
    split: Split,
    still: bool,
    story: Story,
    palette: Palette,
}

impl Composer<'_> {
    fn fill(&mut self, emphasis: Emphasis) {
        if emphasis == Emphasis::Letters || self.rng.chance(1, 8) {
            self.story.label = Some(self.label());
        }
        if emphasis == Emphasis::Contact && !self.still && self.contact() {
            for _ in 0..self.rng.below(2) {
                self.add(0, Emphasis::Gallery);
            }
            return;
        }
        for scene in 0..self.story.scenes.len() {
            let count = match emphasis {
                Emphasis::Gallery => self.rng.range(1, MOST),
                Emphasis::Arrivals => self.rng.range(2, 4),
                Emphasis::Motion | Emphasis::Contact | Emphasis::Change => self.rng.range(1, 3),
                Emphasis::Cut => self.rng.range(1, 2),
                Emphasis::Letters => self.rng.range(if self.split == Split::Test { 1 } else { 0 }, 2),
            };
            for _ in 0..count {
                self.add(scene, emphasis);
            }
        }
    }

    /// Adds a thing where nothing is in its way; gives up when no place is found.
    fn add(&mut self, scene: usize, emphasis: Emphasis) {
        for _ in 0..TRIES {
            let thing = self.thing(scene, emphasis);
            if self.allowed(&thing) && self.fits(&thing) {
                self.story.things.push(thing);
                return;
            }
        }
    }

    /// Whether the next thing is the one that makes the story one of the test split.
    fn is_first(&self) -> bool {
        self.split == Split::Test && self.story.things.is_empty()
    }

    /// A combination that the split may show; the first thing of a test story shows one of those held out.
    fn allowed(&self, thing: &Thing) -> bool {
        let combinations = thing.combinations();
        if self.is_first() {
            return combinations.iter().any(|&(c, s, m)| crate::is_held_out(c, s, m));
        }
        combinations.iter().all(|&(c, s, m)| self.split.allows(c, s, m))
    }

    fn thing(&mut self, scene: usize, emphasis: Emphasis) -> Thing {
        let (start, end) = (self.story.scenes[scene].from, self.story.scene_end(scene));
        let moves = match emphasis {
            _ if self.still => false,
            Emphasis::Motion => self.story.things.is_empty() || self.rng.chance(2, 3),
            Emphasis::Cut => self.rng.chance(1, 2),
            _ => self.rng.chance(1, 4),
        };
        let motion = if moves { *self.rng.pick(&Motion::ALL[1..]) } else { Motion::Still };
        let (from, until) = self.visible(start, end, emphasis);
        let mut thing = self.dressed(motion, self.is_first());
        (thing.from, thing.until) = (from, until);
        let beats = (until - from) / BEAT;
        if beats < 2 && moves {
            thing.motion = Motion::Still;
        }
        if thing.moves() {
            let most = beats.min(8);
            let lasts = self.rng.range(2.min(most), most);
            let begins = from + self.rng.below(beats - lasts + 1) * BEAT;
            thing.moving = [begins, begins + lasts * BEAT];
        } else {
            thing.moving = [from, from];
        }
        if emphasis == Emphasis::Change && !self.still && self.story.things.is_empty() && beats >= 2 {
            let at = from + self.rng.range(1, beats - 1) * BEAT;
            thing.change = Some(self.change(&thing, at));
        }
        self.put(&mut thing);
        thing
    }

    /// When a thing is there.
    fn visible(&mut self, start: u32, end: u32, emphasis: Emphasis) -> (u32, u32) {
        let beats = (end - start) / BEAT;
        let share = match emphasis {
            Emphasis::Arrivals => 3,
            Emphasis::Motion | Emphasis::Letters => 1,
            _ => 0,
        };
        if self.still || beats < 3 || !self.rng.chance(share, 4) {
            return (start, end);
        }
        let from = start + self.rng.range(0, beats - 2) * BEAT;
        let left = (end - from) / BEAT;
        let until = if self.rng.chance(1, 2) { end } else { from + self.rng.range(2, left) * BEAT };
        (from, until)
    }

    /// A thing of the palette; with `first`, of a combination held out.
    fn dressed(&mut self, motion: Motion, first: bool) -> Thing {
        let shape = *self.rng.pick(&self.palette.shapes);
        let colour = match Colour::ALL.iter().find(|colour| first && crate::is_held_out(**colour, shape, motion)) {
            Some(colour) => *colour,
            None => *self.rng.pick(&self.palette.colours),
        };
        let size = *self.rng.pick(Size::ALL);
        Thing {
            colour,
            shape,
            size,
            motion,
            from: 0,
            until: self.story.frames,
            start: [0, 0],
            step: 0,
            moving: [0, 0],
            rebound: None,
            change: None,
        }
    }

    fn change(&mut self, thing: &Thing, at: u32) -> Change {
        let to = match self.rng.below(5) {
            0 | 1 => Property::Colour(other(self.rng, Colour::ALL, thing.colour)),
            2 | 3 => Property::Shape(other(self.rng, Shape::ALL, thing.shape)),
            _ => Property::Size(other(self.rng, Size::ALL, thing.size)),
        };
        Change { at, to }
    }

    /// Chooses where a thing begins and how fast it moves so that it stays in the picture.
    fn put(&mut self, thing: &mut Thing) {
        let size = [self.story.width as i32, self.story.height as i32];
        let radius = largest_radius(thing) + 1;
        if thing.motion == Motion::Still {
            let cell = self.rng.pick(Place::ALL).cell();
            for axis in 0..2 {
                let third = size[axis] / 3;
                let centre = third * cell[axis] as i32 + third / 2 + self.rng.range(0, 8) as i32 - 4;
                thing.start[axis] = centre.clamp(radius, size[axis] - radius) * UNIT;
            }
            return;
        }
        let frames = (thing.moving[1] - thing.moving[0]) as i32;
        if thing.motion == Motion::Circling {
            let turn = self.rng.range(9, 15) as i32;
            thing.step = turn * UNIT;
            thing.start = [
                self.between(radius + 2 * turn, size[0] - radius) * UNIT,
                self.between(radius + turn, size[1] - radius - turn) * UNIT,
            ];
            return;
        }
        let direction = thing.motion.direction();
        for axis in 0..2 {
            let room = size[axis] - 2 * radius;
            thing.start[axis] = match direction[axis] {
                0 => self.between(radius, size[axis] - radius) * UNIT,
                way => {
                    let distance = self.between(room * 2 / 5, room);
                    thing.step = distance * UNIT / frames;
                    let low = self.between(radius, size[axis] - radius - distance);
                    (if way > 0 { low } else { size[axis] - low }) * UNIT
                }
            };
        }
    }

    fn between(&mut self, low: i32, high: i32) -> i32 {
        low + self.rng.below((high - low).max(0) as u32 + 1) as i32
    }

    /// Whether a thing keeps clear of the others and of the letters in all frames.
    fn fits(&self, thing: &Thing) -> bool {
        let frames = thing.from..thing.until;
        frames.into_iter().all(|frame| {
            let Some(look) = thing.at(frame) else { return true };
            let radius = largest_radius(thing);
            let clear = |centre: [i32; 2], half: [i32; 2]| {
                (0..2).any(|axis| (look.centre[axis] - centre[axis]).abs() >= (radius + half[axis] + GAP) * UNIT)
            };
            let letters = self.story.label.as_ref().filter(|label| (label.from..label.until).contains(&frame));
            letters.is_none_or(|label| {
                let half = [label.width() as i32 / 2 + 1, label.height() as i32 / 2 + 1];
                clear([(label.x as i32 + half[0]) * UNIT, (label.y as i32 + half[1]) * UNIT], half)
            }) && self
                .story
                .things
                .iter()
                .all(|other| other.at(frame).is_none_or(|there| clear(there.centre, [largest_radius(other); 2])))
        })
    }

    /// One thing comes, hits another and goes back the way it came. False when no such pair was found.
    fn contact(&mut self) -> bool {
        let size = [self.story.width as i32, self.story.height as i32];
        let beats = self.story.frames / BEAT;
        for _ in 0..TRIES * 2 {
            let motion = *self.rng.pick(&[Motion::Left, Motion::Right, Motion::Up, Motion::Down]);
            let mut mover = self.dressed(motion, self.is_first());
            let coming = self.rng.range(1, (beats / 2).min(4));
            let going = self.rng.range(1, coming);
            let begins = self.rng.below(beats - coming - going + 1) * BEAT;
            mover.moving = [begins, begins + (coming + going) * BEAT];
            mover.rebound = Some(begins + coming * BEAT);
            if !self.allowed(&mover) {
                continue;
            }
            let mut hit = self.dressed(Motion::Still, false);
            if hit.combinations().iter().any(|&(c, s, m)| !self.split.allows(c, s, m))
                || (hit.colour, hit.shape) == (mover.colour, mover.shape)
            {
                continue;
            }
            let apart = mover.size.radius() + hit.size.radius();
            let axis = usize::from(motion.direction()[0] == 0);
            let way = motion.direction()[axis];
            let room = size[axis] - 2 * apart - 4;
            let distance = self.between(room / 2, room);
            mover.step = distance * UNIT / (coming * BEAT) as i32;
            let low = mover.size.radius() + 1 + self.between(0, room - distance);
            let start = if way > 0 { low } else { size[axis] - low };
            let across = self.between(size[1 - axis] / 4, size[1 - axis] * 3 / 4);
            mover.start[axis] = start * UNIT;
            mover.start[1 - axis] = across * UNIT;
            hit.start[axis] = mover.start[axis] + way * (mover.step * (coming * BEAT) as i32 + apart * UNIT);
            hit.start[1 - axis] = across * UNIT;
            if !self.fits(&mover) || !self.fits(&hit) {
                continue;
            }
            let at = begins + coming * BEAT;
            self.story.things.extend([mover, hit]);
            self.story.contact = Some(Contact { mover: 0, hit: 1, at });
            return true;
        }
        false
    }

    fn label(&mut self) -> Label {
        let text: String = match self.rng.below(3) {
            0 => (0..self.rng.range(1, 4)).map(|_| char::from(b'0' + self.rng.below(10) as u8)).collect(),
            1 => (0..self.rng.range(2, 4)).map(|_| char::from(*self.rng.pick(font::LETTERS))).collect(),
            _ => (*self.rng.pick(&WORDS)).to_owned(),
        };
        let widest = (self.story.width - 4) / (text.len() as u32 * font::ADVANCE);
        let scale = if widest >= 3 && self.rng.chance(1, 3) { 3 } else { 2 };
        let (from, until) = match self.still || self.rng.chance(1, 2) {
            true => (0, self.story.frames),
            false => self.visible(0, self.story.frames, Emphasis::Arrivals),
        };
        let mut label = Label { text, scale, x: 0, y: 2, from, until };
        label.x = 2 + self.rng.below(self.story.width - 3 - label.width());
        if self.rng.chance(1, 2) {
            label.y = self.story.height - 2 - label.height();
        }
        label
    }
}

impl Label {
    /// Pixels.
    pub(crate) fn width(&self) -> u32 {
        (self.text.len() as u32 * font::ADVANCE - 1) * self.scale
    }

    /// Pixels.
    pub(crate) fn height(&self) -> u32 {
        font::HEIGHT * self.scale
    }
}

/// Another one of `all`.
fn other<T: Copy + PartialEq>(rng: &mut Rng, all: &[T], one: T) -> T {
    let rest: Vec<T> = all.iter().copied().filter(|item| *item != one).collect();
    *rng.pick(&rest)
}

fn largest_radius(thing: &Thing) -> i32 {
    match thing.change.map(|change| change.to) {
        Some(Property::Size(to)) => thing.size.radius().max(to.radius()),
        _ => thing.size.radius(),
    }
}

const WORDS: [&str; 40] = [
    "GO", "UP", "ON", "OFF", "YES", "NO", "STOP", "OPEN", "HELLO", "BYE", "EXIT", "SALE", "TAXI", "BUS", "CAT", "DOG",
    "SUN", "MOON", "STAR", "FISH", "BIRD", "TREE", "RAIN", "SNOW", "FIRE", "ICE", "TEA", "MILK", "BREAD", "CAKE",
    "KEY", "BOX", "MAP", "RUN", "JUMP", "PLAY", "NEWS", "WIN", "LOVE", "HOME",
];

#[cfg(test)]
mod tests {
    use super::*;

    fn stories(split: Split) -> impl Iterator<Item = Story> {
        (0..1500u64).map(move |i| {
            let emphasis = Emphasis::ALL[i as usize % Emphasis::ALL.len()];
            compose(&mut Rng::new(&[i, split as u64]), split, emphasis, i % 9 == 0)
        })
    }

    #[test]
    fn only_test_stories_show_what_is_held_out() {
        let shows = |story: &Story| {
            story.things.iter().flat_map(Thing::combinations).any(|(c, s, m)| crate::is_held_out(c, s, m))
        };
        assert!(stories(Split::Train).chain(stories(Split::Validation)).all(|story| !shows(&story)));
        assert!(stories(Split::Test).all(|story| shows(&story)));
    }

    #[test]
    fn things_stay_in_the_picture_and_apart() {
        for story in stories(Split::Train).chain(stories(Split::Test)) {
            assert!(story.things.len() <= MOST as usize);
            for frame in 0..story.frames {
                let there: Vec<_> = story.things.iter().map(|thing| thing.at(frame)).collect();
                for (i, look) in there.iter().enumerate() {
                    let Some(look) = look else { continue };
                    let radius = look.size.radius() * UNIT;
                    for (axis, size) in [story.width, story.height].into_iter().enumerate() {
                        let at = look.centre[axis];
                        assert!(at >= radius && at + radius <= size as i32 * UNIT, "{story:?} frame {frame}");
                    }
                    for other in there[i + 1..].iter().flatten() {
                        let apart = (0..2).map(|axis| (look.centre[axis] - other.centre[axis]).abs()).max().unwrap();
                        assert!(apart >= radius + other.size.radius() * UNIT, "{story:?} frame {frame}");
                    }
                }
            }
        }
    }

    #[test]
    fn every_kind_of_event_comes_up() {
        let all: Vec<Story> = stories(Split::Train).collect();
        let share = |what: &dyn Fn(&Story) -> bool| all.iter().filter(|story| what(story)).count();
        assert!(share(&|s| s.contact.is_some()) > 100);
        assert!(share(&|s| s.scenes.len() > 1) > 100);
        assert!(share(&|s| s.label.is_some()) > 200);
        assert!(share(&|s| s.things.iter().any(|t| t.change.is_some())) > 100);
        assert!(share(&|s| s.things.iter().any(|t| s.appears(t))) > 100);
        assert!(share(&|s| s.things.iter().any(|t| s.vanishes(t))) > 50);
        assert!(share(&|s| s.things.len() >= 5) > 30);
        for motion in Motion::ALL {
            assert!(share(&|s| s.things.iter().any(|t| t.motion == *motion)) > 40, "{motion:?}");
        }
    }
}
