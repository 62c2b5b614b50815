//! Frames to patches, and what identifies them.

use sha2::{Digest, Sha256};

use crate::{Frame, FrameKind, Media, MediaKind, Patches, Pixels};

/// Changes with everything that [`hash`] covers or leaves out.
const HASH_VERSION: &[u8] = b"keye-patches-1";

/// Appends the patches of a frame in raster order, `[h/patch * w/patch, 3, patch, patch]`. `rgb` is `[h, w, 3]`; both
/// sides are multiples of `patch`.
pub(crate) fn cut(rgb: &[u8], h: u32, w: u32, patch: u32, out: &mut Vec<u8>) {
    let [h, w, patch] = [h, w, patch].map(|side| side as usize);
    assert!(patch > 0 && h % patch == 0 && w % patch == 0, "{h}x{w} pixels do not divide into patches of {patch}");
    assert_eq!(rgb.len(), h * w * 3, "a frame of another size");
    let start = out.len();
    out.resize(start + rgb.len(), 0);
    let area = patch * patch;
    let bands = rgb.chunks_exact(patch * w * 3).zip(out[start..].chunks_exact_mut(patch * w * 3));
    for (band, patches) in bands {
        for (y, row) in band.chunks_exact(w * 3).enumerate() {
            for (run, patch_values) in row.chunks_exact(patch * 3).zip(patches.chunks_exact_mut(area * 3)) {
                for (x, pixel) in run.chunks_exact(3).enumerate() {
                    let at = y * patch + x;
                    patch_values[at] = pixel[0];
                    patch_values[area + at] = pixel[1];
                    patch_values[2 * area + at] = pixel[2];
                }
            }
        }
    }
}

/// The finished item: `pixels` are the patches of `frames` as [`cut`] appended them, in order. Runs of frames of equal
/// size share a row of the grid.
pub(crate) fn assemble(
    kind: MediaKind,
    frames: Vec<Frame>,
    pixels: Vec<u8>,
    patch: u32,
    sample_fps: Option<f64>,
) -> Media {
    let mut grid_thw: Vec<[u32; 3]> = Vec::new();
    for frame in &frames {
        let (h, w) = (frame.height / patch, frame.width / patch);
        match grid_thw.last_mut() {
            Some(row) if row[1..] == [h, w] => row[0] += 1,
            _ => grid_thw.push([1, h, w]),
        }
    }
    let pixels = Pixels::U8(pixels);
    let hash = hash(kind, &grid_thw, &frames, sample_fps, &pixels);
    Media { kind, patches: Patches { pixels, grid_thw, hash }, frames, sample_fps }
}

/// SHA-256 over everything of a [`Media`] that the model gets to see: kind, grid, kinds and time stamps of the frames,
/// sampling rate, pixels.
fn hash(
    kind: MediaKind,
    grid_thw: &[[u32; 3]],
    frames: &[Frame],
    sample_fps: Option<f64>,
    pixels: &Pixels,
) -> [u8; 32] {
    let mut sha = Sha256::new();
    sha.update(HASH_VERSION);
    sha.update([matches!(kind, MediaKind::Video) as u8]);
    sha.update((grid_thw.len() as u64).to_le_bytes());
    grid_thw.iter().flatten().for_each(|side| sha.update(side.to_le_bytes()));
    sha.update((frames.len() as u64).to_le_bytes());
    for frame in frames {
        sha.update([matches!(frame.kind, FrameKind::Fast) as u8, frame.timestamp.is_some() as u8]);
        sha.update(frame.timestamp.unwrap_or(0.0).to_bits().to_le_bytes());
    }
    sha.update([sample_fps.is_some() as u8]);
    sha.update(sample_fps.unwrap_or(0.0).to_bits().to_le_bytes());
    match pixels {
        Pixels::U8(values) => {
            sha.update([0]);
            sha.update(values);
        }
        Pixels::F32(values) => {
            sha.update([1]);
            values.iter().for_each(|value| sha.update(value.to_bits().to_le_bytes()));
        }
    }
    sha.finalize().into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn patches_run_in_raster_order_channel_first() {
        // A 4x6 picture in patches of 2; every value says where it comes from.
        let rgb: Vec<u8> = (0..4 * 6 * 3).collect();
        let mut out = vec![99];
        cut(&rgb, 4, 6, 2, &mut out);
        assert_eq!(out.len(), 1 + 72);
        let value = |y: u8, x: u8, c: u8| (y * 6 + x) * 3 + c;
        // Patch (1, 2): rows 2 and 3, columns 4 and 5; patch number 1*3+2 = 5.
        let patch = &out[1 + 5 * 12..][..12];
        let wanted: Vec<u8> =
            (0..3).flat_map(|c| [value(2, 4, c), value(2, 5, c), value(3, 4, c), value(3, 5, c)]).collect();
        assert_eq!(patch, wanted);
    }

    fn media(kind: MediaKind, frames: &[Frame], fps: Option<f64>, pixels: &[u8]) -> [u8; 32] {
        assemble(kind, frames.to_vec(), pixels.to_vec(), 14, fps).patches.hash
    }

    #[test]
    fn the_hash_covers_every_part() {
        let frame = Frame { index: 0, timestamp: Some(0.5), kind: FrameKind::Slow, height: 28, width: 28 };
        let base = media(MediaKind::Video, std::slice::from_ref(&frame), Some(2.0), &[1, 2, 3]);
        let others = [
            media(MediaKind::Image, std::slice::from_ref(&frame), Some(2.0), &[1, 2, 3]),
            media(MediaKind::Video, &[Frame { width: 56, ..frame.clone() }], Some(2.0), &[1, 2, 3]),
            media(MediaKind::Video, &[Frame { kind: FrameKind::Fast, ..frame.clone() }], Some(2.0), &[1, 2, 3]),
            media(MediaKind::Video, &[Frame { timestamp: Some(0.6), ..frame.clone() }], Some(2.0), &[1, 2, 3]),
            media(MediaKind::Video, &[Frame { timestamp: None, ..frame.clone() }], Some(2.0), &[1, 2, 3]),
            media(MediaKind::Video, std::slice::from_ref(&frame), Some(1.0), &[1, 2, 3]),
            media(MediaKind::Video, std::slice::from_ref(&frame), None, &[1, 2, 3]),
            media(MediaKind::Video, std::slice::from_ref(&frame), Some(2.0), &[1, 2, 4]),
        ];
        assert!(others.iter().all(|other| *other != base));
        assert_eq!(base, media(MediaKind::Video, &[frame], Some(2.0), &[1, 2, 3]));
    }

    #[test]
    fn runs_of_equal_size_share_a_grid_row() {
        let frame = |height| Frame { index: 0, timestamp: None, kind: FrameKind::Slow, height, width: 28 };
        let frames = [56, 28, 28, 56].map(frame).to_vec();
        let media = assemble(MediaKind::Video, frames, Vec::new(), 14, None);
        assert_eq!(media.patches.grid_thw, [[1, 4, 2], [2, 2, 2], [1, 4, 2]]);
    }
}
