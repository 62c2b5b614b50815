//! Sizes that are multiples of a token's side, within a range of pixels (spec §10.1).

/// Side of a token in `keye-vl-utils`: patch 14 times merge 2.
pub(crate) const IMAGE_FACTOR: u32 = 28;
/// Pixels of one token of `keye-vl-utils`.
pub(crate) const TOKEN_PIXELS: u64 = IMAGE_FACTOR as u64 * IMAGE_FACTOR as u64;

const MAX_RATIO: f64 = 200.0;

/// The form of `keye-vl-utils`: `(height, width)`, each at least `factor`.
pub(crate) fn smart_resize_utils(h: u32, w: u32, factor: u32, min: u64, max: u64) -> Result<(u32, u32), String> {
    smart_resize_real(h, w, factor, min as f64, max as f64)
}

/// [`smart_resize_utils`] with limits that are no whole numbers, as the clip budgets of the reference are.
pub(crate) fn smart_resize_real(h: u32, w: u32, factor: u32, min: f64, max: f64) -> Result<(u32, u32), String> {
    check(f64::from(h), f64::from(w), factor, min, max)?;
    fit(f64::from(h), f64::from(w), factor, min, max, f64::from(factor))
}

/// The form of the model's image processor ("hub"): sides below `factor` are first enlarged to it in proportion.
pub(crate) fn smart_resize_hub(h: u32, w: u32, factor: u32, min: u64, max: u64) -> Result<(u32, u32), String> {
    if h == 0 || w == 0 {
        return Err(format!("the size {h}x{w} is empty"));
    }
    let (mut height, mut width, side) = (f64::from(h), f64::from(w), f64::from(factor));
    if height < side {
        width = (width * side / height).round_ties_even();
        height = side;
    }
    if width < side {
        height = (height * side / width).round_ties_even();
        width = side;
    }
    check(height, width, factor, min as f64, max as f64)?;
    fit(height, width, factor, min as f64, max as f64, 0.0)
}

fn check(h: f64, w: f64, factor: u32, min: f64, max: f64) -> Result<(), String> {
    if h < 1.0 || w < 1.0 {
        return Err(format!("the size {h}x{w} is empty"));
    }
    if factor == 0 || !(min >= 0.0 && max > 0.0) {
        return Err(format!("cannot fit into {min} to {max} pixels in steps of {factor}"));
    }
    if h.max(w) / h.min(w) > MAX_RATIO {
        return Err(format!("the sides of {h}x{w} differ by more than a factor of {MAX_RATIO}"));
    }
    Ok(())
}

/// `h` and `w` are whole numbers; `lowest` is the floor of a side in the rounding and in the shrinking branch.
fn fit(h: f64, w: f64, factor: u32, min: f64, max: f64, lowest: f64) -> Result<(u32, u32), String> {
    let side = f64::from(factor);
    let mut height = ((h / side).round_ties_even() * side).max(lowest);
    let mut width = ((w / side).round_ties_even() * side).max(lowest);
    if height * width > max {
        let beta = (h * w / max).sqrt();
        height = ((h / beta / side).floor() * side).max(lowest);
        width = ((w / beta / side).floor() * side).max(lowest);
    } else if height * width < min {
        let beta = (min / (h * w)).sqrt();
        height = (h * beta / side).ceil() * side;
        width = (w * beta / side).ceil() * side;
    }
    let whole = |x: f64| (x >= 1.0 && x <= f64::from(u32::MAX)).then_some(x as u32);
    match (whole(height), whole(width)) {
        (Some(height), Some(width)) => Ok((height, width)),
        _ => Err(format!("{h}x{w} cannot be fitted into {min} to {max} pixels (it would become {height}x{width})")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Multiples of 28, and within the limits wherever the limits leave room for a multiple of 28.
    #[test]
    fn sizes_are_multiples_within_the_limits() {
        let sides = [1, 13, 14, 27, 28, 29, 42, 55, 97, 200, 641, 1080, 1921, 4000, 65_535];
        for (h, w) in sides.iter().flat_map(|h| sides.iter().map(move |w| (*h, *w))) {
            let ratio = f64::from(h.max(w)) / f64::from(h.min(w));
            for (min, max) in [(3136, 1_003_520), (100_352, 602_112), (37_632, 602_112)] {
                let got = smart_resize_utils(h, w, 28, min, max);
                if ratio > 200.0 {
                    assert!(got.is_err(), "{h}x{w}");
                    continue;
                }
                let (height, width) = got.unwrap();
                assert!(height % 28 == 0 && width % 28 == 0 && height > 0 && width > 0, "{h}x{w} -> {height}x{width}");
                let pixels = u64::from(height) * u64::from(width);
                assert!(pixels >= min, "{h}x{w} -> {height}x{width} below {min}");
                if ratio < 20.0 {
                    assert!(pixels <= max, "{h}x{w} -> {height}x{width} above {max}");
                }
                assert_eq!(smart_resize_utils(w, h, 28, min, max), Ok((width, height)), "not symmetric");
            }
        }
    }

    #[test]
    fn a_result_is_its_own_result() {
        for (h, w) in [(50, 80), (480, 640), (1080, 1920), (4000, 3000), (1, 3)] {
            let (a, b) = smart_resize_utils(h, w, 28, 3136, 1_003_520).unwrap();
            assert_eq!(smart_resize_utils(a, b, 28, 3136, 1_003_520), Ok((a, b)));
            assert_eq!(smart_resize_hub(a, b, 28, 3136, 1_003_520), Ok((a, b)));
        }
    }

    #[test]
    fn hostile_sizes_and_limits_are_errors() {
        assert!(smart_resize_utils(0, 5, 28, 3136, 1_003_520).is_err());
        assert!(smart_resize_hub(5, 0, 28, 3136, 1_003_520).is_err());
        assert!(smart_resize_utils(1, u32::MAX, 28, 3136, 1_003_520).is_err());
        assert!(smart_resize_hub(1, u32::MAX, 28, 3136, 1_003_520).is_err());
        assert!(smart_resize_utils(100, 100, 28, u64::MAX, u64::MAX).is_err());
        assert!(smart_resize_utils(100, 100, 28, 0, 0).is_err());
        assert!(smart_resize_utils(u32::MAX, u32::MAX, 28, 3136, 1_003_520).is_ok());
        // The processor's form has no floor: it may shrink a side to nothing, where the reference fails too.
        assert!(smart_resize_hub(28, 5600, 28, 3136, 3136).is_err());
    }
}
