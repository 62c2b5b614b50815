//! RGB to HSV as OpenCV does it in 8 bits (spec §10.4).

use std::sync::LazyLock;

/// `sdiv[i] = rint(255 * 4096 / i)` and `hdiv[i] = rint(180 * 4096 / (6 i))`, both 0 at 0.
static TABLES: LazyLock<([i32; 256], [i32; 256])> = LazyLock::new(|| {
    let table = |numerator: f64| {
        let mut out = [0; 256];
        for (i, value) in out.iter_mut().enumerate().skip(1) {
            *value = (numerator / i as f64).round_ties_even() as i32;
        }
        out
    };
    (table(255.0 * 4096.0), table(180.0 * 4096.0 / 6.0))
});

/// Converts interleaved RGB to interleaved HSV of the same length: H in 0..180, S and V in 0..256.
pub(crate) fn rgb_to_hsv(rgb: &[u8], out: &mut [u8]) {
    let (sdiv, hdiv) = &*TABLES;
    for (pixel, hsv) in rgb.chunks_exact(3).zip(out.chunks_exact_mut(3)) {
        let [r, g, b] = [i32::from(pixel[0]), i32::from(pixel[1]), i32::from(pixel[2])];
        let v = r.max(g).max(b);
        let d = v - r.min(g).min(b);
        let s = (d * sdiv[v as usize] + 2048) >> 12;
        let raw = if v == r {
            g - b
        } else if v == g {
            b - r + 2 * d
        } else {
            r - g + 4 * d
        };
        let h = (raw * hdiv[d as usize] + 2048) >> 12;
        let h = if h < 0 { h + 180 } else { h };
        hsv[0] = h as u8;
        hsv[1] = s as u8;
        hsv[2] = v as u8;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hsv(rgb: [u8; 3]) -> [u8; 3] {
        let mut out = [0; 3];
        rgb_to_hsv(&rgb, &mut out);
        out
    }

    #[test]
    fn primary_colours() {
        assert_eq!(hsv([255, 0, 0]), [0, 255, 255]);
        assert_eq!(hsv([0, 255, 0]), [60, 255, 255]);
        assert_eq!(hsv([0, 0, 255]), [120, 255, 255]);
        assert_eq!(hsv([255, 255, 0]), [30, 255, 255]);
        assert_eq!(hsv([0, 0, 0]), [0, 0, 0]);
        assert_eq!(hsv([255, 255, 255]), [0, 0, 255]);
    }

    #[test]
    fn hue_stays_below_180() {
        let all = (0..=255u8).step_by(5);
        for r in all.clone() {
            for g in all.clone() {
                for b in all.clone() {
                    let [h, _, v] = hsv([r, g, b]);
                    assert!(h < 180 && v == r.max(g).max(b), "{r} {g} {b}");
                }
            }
        }
    }
}
