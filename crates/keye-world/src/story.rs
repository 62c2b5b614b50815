//! What happens in a clip: the truth that frames, captions and questions are made from.
//!
//! Lengths are sixteenths of a pixel, times are frame numbers; everything that happens begins and ends on even frames, half
//! a second apart.

use crate::{Background, Colour, Motion, Place, Shape, Size};

/// Frames per second of all clips.
pub const FPS: u32 = 4;
/// Frames of half a second, the grid of times.
pub const BEAT: u32 = 2;
/// Steps of a pixel in positions.
pub const UNIT: i32 = 16;

/// A clip, or a still when it has one frame.
#[derive(Debug, Clone, PartialEq)]
pub struct Story {
    /// Pixels.
    pub width: u32,
    /// Pixels.
    pub height: u32,
    /// Number of frames.
    pub frames: u32,
    /// One, or several with cuts between them; the first begins at frame 0.
    pub scenes: Vec<Scene>,
    /// At most six. The first of a test clip does what is held out.
    pub things: Vec<Thing>,
    /// Letters to read.
    pub label: Option<Label>,
    /// Things that meet.
    pub contact: Option<Contact>,
}

/// From a cut to the next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Scene {
    /// First frame.
    pub from: u32,
    /// Behind everything.
    pub background: Background,
}

/// Something coloured.
#[derive(Debug, Clone, PartialEq)]
pub struct Thing {
    /// When it appears.
    pub colour: Colour,
    /// When it appears.
    pub shape: Shape,
    /// When it appears.
    pub size: Size,
    /// What it does from `moving[0]` on.
    pub motion: Motion,
    /// First frame in which it is there.
    pub from: u32,
    /// First frame in which it is gone.
    pub until: u32,
    /// Centre before it moves.
    pub start: [i32; 2],
    /// Way per frame while it moves; the radius for circling.
    pub step: i32,
    /// First frame of moving and the one after the last; equal when it never moves.
    pub moving: [u32; 2],
    /// From this frame on the way is reversed.
    pub rebound: Option<u32>,
    /// It turns into something else.
    pub change: Option<Change>,
}

/// A thing changes one of its properties.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Change {
    /// First frame with the new one.
    pub at: u32,
    /// The new one.
    pub to: Property,
}

/// A property of a thing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Property {
    /// A colour.
    Colour(Colour),
    /// An outline.
    Shape(Shape),
    /// A size.
    Size(Size),
}

/// Letters and digits over the picture.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Label {
    /// Capital letters and digits.
    pub text: String,
    /// Pixels per dot of the font.
    pub scale: u32,
    /// Left edge in pixels.
    pub x: u32,
    /// Upper edge in pixels.
    pub y: u32,
    /// First frame in which it is there.
    pub from: u32,
    /// First frame in which it is gone.
    pub until: u32,
}

/// Two things meet and part again.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Contact {
    /// Index of the one that comes.
    pub mover: usize,
    /// Index of the one that is hit.
    pub hit: usize,
    /// First frame after the meeting.
    pub at: u32,
}

/// A thing in one frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Look {
    /// Its colour.
    pub colour: Colour,
    /// Its outline.
    pub shape: Shape,
    /// Its size.
    pub size: Size,
    /// Its centre in sixteenths of a pixel.
    pub centre: [i32; 2],
}

/// A circle of radius 64 in sixteen frames: one round takes four seconds.
const TURN: [[i32; 2]; 16] = [
    [64, 0],
    [59, 24],
    [45, 45],
    [24, 59],
    [0, 64],
    [-24, 59],
    [-45, 45],
    [-59, 24],
    [-64, 0],
    [-59, -24],
    [-45, -45],
    [-24, -59],
    [0, -64],
    [24, -59],
    [45, -45],
    [59, -24],
];

impl Size {
    /// Half the extent of a thing in pixels.
    pub fn radius(self) -> i32 {
        match self {
            Self::Small => 7,
            Self::Large => 13,
        }
    }
}

impl Thing {
    /// How it is in a frame; `None` when it is not there.
    pub fn at(&self, frame: u32) -> Option<Look> {
        if !(self.from..self.until).contains(&frame) {
            return None;
        }
        let (mut colour, mut shape, mut size) = (self.colour, self.shape, self.size);
        if let Some(change) = self.change.filter(|change| frame >= change.at) {
            match change.to {
                Property::Colour(to) => colour = to,
                Property::Shape(to) => shape = to,
                Property::Size(to) => size = to,
            }
        }
        Some(Look { colour, shape, size, centre: self.centre(frame) })
    }

    fn centre(&self, frame: u32) -> [i32; 2] {
        let moved = frame.clamp(self.moving[0], self.moving[1]) - self.moving[0];
        let [x, y] = self.start;
        if self.motion == Motion::Circling {
            let [dx, dy] = TURN[moved as usize % TURN.len()];
            return [x + (dx - TURN[0][0]) * self.step / 64, y + dy * self.step / 64];
        }
        let back =
            self.rebound.map_or(0, |at| frame.clamp(at.min(self.moving[1]), self.moving[1]) - at.min(self.moving[1]));
        let steps = (moved as i32 - 2 * back as i32) * self.step;
        let [dx, dy] = self.motion.direction();
        [x + dx * steps, y + dy * steps]
    }

    /// Every combination of colour, shape and motion that it shows.
    pub fn combinations(&self) -> Vec<(Colour, Shape, Motion)> {
        let mut looks = vec![(self.colour, self.shape)];
        match self.change.map(|change| change.to) {
            Some(Property::Colour(to)) => looks.push((to, self.shape)),
            Some(Property::Shape(to)) => looks.push((self.colour, to)),
            Some(Property::Size(_)) | None => {}
        }
        let mut motions = vec![self.motion];
        if self.rebound.is_some() {
            motions.push(self.motion.reversed());
        }
        looks.iter().flat_map(|&(colour, shape)| motions.iter().map(move |&motion| (colour, shape, motion))).collect()
    }

    /// Whether it ever moves.
    pub fn moves(&self) -> bool {
        self.motion != Motion::Still
    }
}

impl Story {
    /// Length in seconds.
    pub fn seconds(&self) -> f64 {
        f64::from(self.frames) / f64::from(FPS)
    }

    /// The scene of a frame: its index.
    pub fn scene_at(&self, frame: u32) -> usize {
        self.scenes.partition_point(|scene| scene.from <= frame).saturating_sub(1)
    }

    /// First frame after a scene.
    pub fn scene_end(&self, scene: usize) -> u32 {
        self.scenes.get(scene + 1).map_or(self.frames, |next| next.from)
    }

    /// True when the thing comes into a scene that has already begun.
    pub fn appears(&self, thing: &Thing) -> bool {
        self.scenes[self.scene_at(thing.from)].from < thing.from
    }

    /// True when the thing goes before its scene ends.
    pub fn vanishes(&self, thing: &Thing) -> bool {
        thing.until < self.scene_end(self.scene_at(thing.from))
    }

    /// Where a thing is in a frame in which it is there.
    pub fn place(&self, thing: &Thing, frame: u32) -> Option<Place> {
        let look = thing.at(frame)?;
        let size = [self.width as i32 * UNIT, self.height as i32 * UNIT];
        Some(Place::of(look.centre, size))
    }

    /// True for a picture.
    pub fn is_still(&self) -> bool {
        self.frames == 1
    }
}

/// Seconds of a frame number as texts have them, with one decimal.
pub(crate) fn seconds(frame: u32) -> String {
    let tenths = frame * 10 / FPS;
    format!("{}.{}", tenths / 10, tenths % 10)
}
