//! Slow or fast: how much a frame still looks like the last slow one (spec §10.4).

use crate::FrameKind;
use crate::hsv::rgb_to_hsv;
use crate::resample::{Kernel, Mode, Resizer, Scratch};
use crate::smart_resize::{IMAGE_FACTOR, TOKEN_PIXELS, smart_resize_utils};

/// Side of a compared tile in pixels.
const TILE: usize = IMAGE_FACTOR as usize;
const TILE_THRESHOLD: f64 = 0.7;
const EPSILON: f64 = 1e-8;
/// Both norms below this: an empty tile, left out of the mean.
const EMPTY_NORM: f64 = 0.01;
/// Pixels of the working copy: 48 to 256 tokens.
const WORK_PIXELS: (u64, u64) = (48 * TOKEN_PIXELS, 256 * TOKEN_PIXELS);

/// Tells slow from fast frames as they stream by. All frames have one size.
pub(crate) struct Classifier {
    resizer: Resizer,
    scratch: Scratch,
    min_frame_similarity: f64,
    tiles_across: usize,
    rgb: Vec<u8>,
    current: Working,
    reference: Option<Working>,
    last_similarity: Option<f32>,
}

/// A frame as it is compared.
#[derive(Default)]
struct Working {
    hsv: Vec<u8>,
    /// Sum of squares per tile, in raster order. At most 3*28*28*255^2, about 1.5e8.
    squares: Vec<u32>,
}

impl Classifier {
    /// For frames of `h` x `w` pixels; a frame whose similarity to the last slow frame is below
    /// `min_frame_similarity` is slow.
    pub(crate) fn new(h: u32, w: u32, min_frame_similarity: f64) -> Result<Self, String> {
        let (work_h, work_w) = smart_resize_utils(h, w, IMAGE_FACTOR, WORK_PIXELS.0, WORK_PIXELS.1)?;
        Ok(Self {
            resizer: Resizer::new(h, w, work_h, work_w, Kernel::Bilinear, Mode::Int16),
            scratch: Scratch::default(),
            min_frame_similarity,
            tiles_across: work_w as usize / TILE,
            rgb: Vec::new(),
            current: Working::default(),
            reference: None,
            last_similarity: None,
        })
    }

    /// The kind of the next frame, interleaved RGB of the size given to [`Classifier::new`]. The first one is slow.
    pub(crate) fn push(&mut self, rgb_frame: &[u8]) -> FrameKind {
        self.resizer.run(rgb_frame, &mut self.rgb, &mut self.scratch);
        self.current.hsv.resize(self.rgb.len(), 0);
        rgb_to_hsv(&self.rgb, &mut self.current.hsv);
        self.current.squares.clear();
        for_each_tile(&self.current.hsv, &self.current.hsv, self.tiles_across, |squares| {
            self.current.squares.push(squares);
        });

        let Some(reference) = &mut self.reference else {
            self.reference = Some(std::mem::take(&mut self.current));
            self.last_similarity = None;
            return FrameKind::Slow;
        };
        let similarity = similarity(reference, &self.current, self.tiles_across);
        self.last_similarity = Some(similarity);
        // NaN, when no tile is left, compares false: fast.
        if f64::from(similarity) < self.min_frame_similarity {
            std::mem::swap(reference, &mut self.current);
            FrameKind::Slow
        } else {
            FrameKind::Fast
        }
    }

    /// What the last pushed frame was judged by: its similarity to the slow frame before it; `None` for the first.
    #[cfg_attr(not(test), allow(dead_code, reason = "the golden tests compare it"))]
    pub(crate) fn last_similarity(&self) -> Option<f32> {
        self.last_similarity
    }
}

/// Part of the tiles that look alike, of those that are not empty in both. The reference takes the mean in float32
/// and compares it in double, so that 9 of 10 is below a threshold of 0.9.
fn similarity(a: &Working, b: &Working, tiles_across: usize) -> f32 {
    let (mut tile, mut alike, mut counted) = (0, 0u32, 0u32);
    for_each_tile(&a.hsv, &b.hsv, tiles_across, |dot| {
        let norm_a = f64::from(a.squares[tile]).sqrt() + EPSILON;
        let norm_b = f64::from(b.squares[tile]).sqrt() + EPSILON;
        tile += 1;
        if norm_a < EMPTY_NORM && norm_b < EMPTY_NORM {
            return;
        }
        counted += 1;
        if f64::from(dot) / (norm_a * norm_b) > TILE_THRESHOLD {
            alike += 1;
        }
    });
    alike as f32 / counted as f32
}

/// Calls `tile` with the dot product of each pair of tiles, in raster order. Integers, so that the order of the sums
/// does not matter.
fn for_each_tile(a: &[u8], b: &[u8], tiles_across: usize, mut tile: impl FnMut(u32)) {
    let run = TILE * 3;
    let band = TILE * run * tiles_across;
    let mut dots = vec![0u32; tiles_across];
    for (band_a, band_b) in a.chunks_exact(band).zip(b.chunks_exact(band)) {
        dots.fill(0);
        for (i, (run_a, run_b)) in band_a.chunks_exact(run).zip(band_b.chunks_exact(run)).enumerate() {
            let dot = run_a.iter().zip(run_b).fold(0u32, |sum, (x, y)| sum.wrapping_add(u32::from(*x) * u32::from(*y)));
            dots[i % tiles_across] += dot;
        }
        dots.iter().for_each(|dot| tile(*dot));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn frame(h: usize, w: usize, f: impl Fn(usize, usize) -> [u8; 3]) -> Vec<u8> {
        (0..h * w).flat_map(|i| f(i / w, i % w)).collect()
    }

    #[test]
    fn black_frames_compare_as_nothing_and_are_fast() {
        let mut classifier = Classifier::new(60, 80, 0.9).unwrap();
        let black = vec![0; 60 * 80 * 3];
        assert_eq!(classifier.push(&black), FrameKind::Slow);
        assert_eq!(classifier.push(&black), FrameKind::Fast);
        assert!(classifier.last_similarity().unwrap().is_nan());
    }

    #[test]
    fn a_change_is_slow_and_becomes_the_reference() {
        let mut classifier = Classifier::new(60, 80, 0.9).unwrap();
        let red = frame(60, 80, |_, _| [200, 10, 10]);
        let black = vec![0; 60 * 80 * 3];
        let kinds = [&red, &red, &black, &black, &red].map(|f| classifier.push(f));
        use FrameKind::{Fast, Slow};
        assert_eq!(kinds, [Slow, Fast, Slow, Fast, Slow]);
    }

    /// The reference breaks on grids of one row; the rule itself does not.
    #[test]
    fn grids_of_one_row_or_column_work() {
        for (h, w) in [(10, 1900), (1900, 10)] {
            let mut classifier = Classifier::new(h, w, 0.9).unwrap();
            let (h, w) = (h as usize, w as usize);
            let red = frame(h, w, |_, _| [200, 10, 10]);
            let half = frame(h, w, |y, x| if x + y < (h + w) / 2 { [200, 10, 10] } else { [0, 0, 0] });
            assert_eq!(classifier.push(&red), FrameKind::Slow);
            assert_eq!(classifier.push(&half), FrameKind::Slow);
            let similarity = classifier.last_similarity().unwrap();
            assert!((0.4..0.6).contains(&similarity), "{similarity}");
        }
    }
}
