//! Frames of a story.

use std::sync::Arc;

use crate::Story;
use crate::raster::render;
use crate::story::FPS;

/// A clip or a still, rendered when it is looked at. Clones share the story.
#[derive(Debug, Clone, PartialEq)]
pub struct Clip(Arc<Story>);

impl Clip {
    /// What the story shows.
    pub fn new(story: Arc<Story>) -> Self {
        Self(story)
    }

    /// Pixels.
    pub fn width(&self) -> u32 {
        self.0.width
    }

    /// Pixels.
    pub fn height(&self) -> u32 {
        self.0.height
    }

    /// Frames per second.
    pub fn fps(&self) -> f64 {
        f64::from(FPS)
    }

    /// Number of frames.
    pub fn len(&self) -> u32 {
        self.0.frames
    }

    /// Never: a clip has a frame.
    pub fn is_empty(&self) -> bool {
        self.0.frames == 0
    }

    /// A frame below [`Clip::len`]: `[height, width, 3]`, RGB.
    pub fn frame(&self, index: u32) -> Vec<u8> {
        render(&self.0, index)
    }

    /// All frames in order, each rendered when it is asked for.
    pub fn frames(&self) -> impl Iterator<Item = Vec<u8>> + '_ {
        (0..self.len()).map(|index| self.frame(index))
    }

    /// The truth.
    pub fn story(&self) -> &Story {
        &self.0
    }
}
