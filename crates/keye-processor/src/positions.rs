//! Three-axis positions of a prompt (spec §6.2).

use crate::ProcessorError;
use crate::expand::Block;

/// Positions `(time, row, column)` of `tokens` tokens whose media are `blocks`, in token order, and `rope_delta`.
///
/// Text counts up on all axes. A block starts at `next`: token (ti, hi, wi) of its grid stands at
/// `next + trunc(ti * seconds_per_step * tokens_per_second)`, `next + hi`, `next + wi`, the products in f32; then `next` is
/// one above the block's highest position.
pub(crate) fn positions(
    tokens: usize,
    blocks: &[Block],
    tokens_per_second: f32,
) -> Result<(Vec<[u32; 3]>, i64), ProcessorError> {
    let mut out = Vec::with_capacity(tokens);
    let mut next = 0u32;
    for block in blocks {
        next = text(&mut out, next, block.span.start)?;
        let [t, h, w] = block.grid;
        let mut highest = next;
        for ti in 0..t {
            let step = (ti as f32 * block.seconds_per_step * tokens_per_second).trunc();
            let time = add(next, step as u64)?;
            // All of it once per frame, so that what follows cannot overflow.
            highest = highest.max(time).max(add(next, u64::from(h.max(w)))? - 1);
            for hi in 0..h {
                out.extend((0..w).map(|wi| [time, next + hi, next + wi]));
            }
        }
        if out.len() != block.span.start + block.span.len {
            return Err(ProcessorError::Prompt("a block of media has another length than its grid".into()));
        }
        next = add(highest, 1)?;
    }
    next = text(&mut out, next, tokens)?;
    Ok((out, i64::from(next) - tokens as i64))
}

/// Positions and `rope_delta` of ids whose media are runs of the pads `image` and `video`: a run takes the next rows of its
/// kind's grids `(t, h, w)` in patches, `merge` by `merge` of which are a token. Time steps count one each, so rows with
/// `t > 1` are told as frames of one row each (spec of 2.0, §4.4).
///
/// # Errors
///
/// A run whose length its grids do not make up; grids left over; `merge` is 0.
pub fn prompt_positions(
    ids: &[u32],
    image: (u32, &[[u32; 3]]),
    video: (u32, &[[u32; 3]]),
    merge: u32,
) -> Result<(Vec<[u32; 3]>, i64), ProcessorError> {
    if merge == 0 {
        return Err(ProcessorError::Prompt("merge: expected at least 1, found 0".into()));
    }
    let frames = |grids: &[[u32; 3]]| -> Vec<[u32; 3]> {
        let tokens =
            |[t, h, w]: &[u32; 3]| std::iter::repeat_n([1, h / merge, w / merge], (*t as usize).min(ids.len() + 1));
        grids.iter().flat_map(tokens).collect()
    };
    let mut kinds = [(image.0, frames(image.1).into_iter()), (video.0, frames(video.1).into_iter())];
    let (mut blocks, mut start) = (Vec::new(), 0);
    while start < ids.len() {
        let Some((_, grids)) = kinds.iter_mut().find(|(pad, _)| *pad == ids[start]) else {
            start += 1;
            continue;
        };
        let error = |reason: String| ProcessorError::Prompt(format!("pads of media at token {start}: {reason}"));
        let grid = grids.next().ok_or_else(|| error("no grid is left for them".into()))?;
        let len = grid.iter().try_fold(1u32, |n, side| n.checked_mul(*side)).unwrap_or(u32::MAX) as usize;
        if len == 0
            || ids.get(start..start.saturating_add(len)).is_none_or(|run| run.iter().any(|id| *id != ids[start]))
        {
            return Err(error(format!("expected {len} for a grid of {grid:?} tokens")));
        }
        let span = crate::FeatureSpan { media: 0, start, len, row: 0 };
        blocks.push(Block { span, grid, seconds_per_step: 0.0 });
        start += len;
    }
    if kinds.iter_mut().any(|(_, grids)| grids.next().is_some()) {
        return Err(ProcessorError::Prompt("there are more grids than runs of pads".into()));
    }
    positions(ids.len(), &blocks, 0.0)
}

/// Positions and `rope_delta` of a decoder that counts tokens whatever they are ([`crate::PositionRule::Sequential`]).
pub fn sequential_positions(tokens: usize) -> Result<(Vec<[u32; 3]>, i64), ProcessorError> {
    positions(tokens, &[], 0.0)
}

/// Counts up to token `end`; returns the next free position.
fn text(out: &mut Vec<[u32; 3]>, next: u32, end: usize) -> Result<u32, ProcessorError> {
    let count = end.checked_sub(out.len()).ok_or_else(|| ProcessorError::Prompt("blocks of media overlap".into()))?;
    let after = add(next, count as u64)?;
    out.extend((next..after).map(|p| [p; 3]));
    Ok(after)
}

fn add(position: u32, n: u64) -> Result<u32, ProcessorError> {
    u64::from(position)
        .checked_add(n)
        .and_then(|sum| u32::try_from(sum).ok())
        .filter(|sum| *sum < i32::MAX as u32)
        .ok_or_else(|| ProcessorError::Prompt(format!("positions run beyond {}: the clip is too long", i32::MAX)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::FeatureSpan;

    fn block(start: usize, grid: [u32; 3], seconds_per_step: f32) -> Block {
        let len = grid.iter().product::<u32>() as usize;
        Block { span: FeatureSpan { media: 0, start, len, row: 0 }, grid, seconds_per_step }
    }

    #[test]
    fn an_image_advances_by_its_longer_side() {
        let (positions, delta) = positions(2 + 24 + 1, &[block(2, [1, 4, 6], 0.0)], 2.0).unwrap();
        assert_eq!(positions[1], [1, 1, 1]);
        assert_eq!(positions[2 + 6], [2, 3, 2]);
        assert_eq!(positions[2 + 23], [2, 5, 7]);
        assert_eq!(positions[26], [8, 8, 8]);
        assert_eq!(delta, 9 - 27);
    }

    #[test]
    fn time_steps_are_cut_in_f32() {
        // 1/3 s per frame at 2 per second: 0, 0.67, 1.33, 2, 2.67; 3 * f32(1/3) * 2 is exactly 2 in f32.
        let (positions, delta) = positions(5, &[block(0, [5, 1, 1], 1.0 / 3.0)], 2.0).unwrap();
        assert_eq!(positions.iter().map(|p| p[0]).collect::<Vec<_>>(), [0, 0, 1, 2, 2]);
        assert_eq!(delta, 3 - 5);
    }

    #[test]
    fn every_token_has_a_position_and_delta_is_one_above_the_highest() {
        for seed in 0..200u32 {
            let (mut start, mut blocks) = (0usize, Vec::new());
            for i in 0..seed % 5 {
                start += (seed as usize * 7 + i as usize) % 4;
                let made = block(start, [1 + seed % 3, 1 + (seed + i) % 4, 1 + seed % 6], 0.37 * i as f32);
                start += made.span.len;
                blocks.push(made);
            }
            let n = start + seed as usize % 3;
            let (positions, delta) = positions(n, &blocks, 2.0).unwrap();
            assert_eq!(positions.len(), n);
            let highest = positions.iter().flatten().max().map_or(0, |p| i64::from(*p) + 1);
            assert_eq!(delta, highest - n as i64);
        }
    }

    #[test]
    fn absurd_blocks_are_errors() {
        let none = prompt_positions(&[1, 2], (2, &[[1, 4, 4]]), (3, &[]), 0).unwrap_err().to_string();
        assert!(none.contains("merge: expected at least 1"), "{none}");
        assert!(positions(5, &[block(0, [5, 1, 1], 1e30)], 2.0).is_err());
        assert!(positions(1, &[block(0, [5, 1, 1], 1.0)], 2.0).is_err());
        assert!(positions(9, &[block(3, [1, 1, 1], 1.0), block(2, [1, 1, 1], 1.0)], 2.0).is_err());
    }
}
