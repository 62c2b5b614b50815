//! Rows that are listed, patches, the loss.

use super::formulas::{softmax_loss, widen};
use super::{Expected, Result, Suite, all};
use crate::training::{Device, Taps};

impl<D: Device> Suite<'_, D> {
    /// Each of `rows` about every third time, in a shuffled order.
    fn some_rows(rows: usize) -> Vec<u32> {
        let shuffled = (0..rows).map(|i| (i * 37 + 11) % rows);
        shuffled.filter(|row| row % 3 == 1).map(|row| row as u32).collect()
    }

    pub(super) fn listed_rows(&mut self) -> Result<()> {
        let shapes: &[_] = if self.small { &[(10, 270)] } else { &[(10, 3), (50, 300), (2000, 7)] };
        for &(n, d) in shapes {
            let (from, to) = (self.inside(n, d, 1.0), self.inside(n, d, 1.0));
            let once = Self::some_rows(n);
            let twice: Vec<u32> = once.iter().chain(&once).copied().collect();
            let row = |row: &u32| &from.values()[*row as usize * d..][..d];
            for rows in [&twice[..], &[]] {
                let expected = Expected::all("rows", widen(&rows.iter().flat_map(row).copied().collect::<Vec<f32>>()));
                self.check(&format!("gather {} of {n}x{d}", rows.len()), &[expected], |device| {
                    Ok(vec![all(device, &device.gather(from.of(&from.array(device)?), rows)?)?])
                })?;
            }
            for rows in [&once[..], &[]] {
                let mut scattered = widen(to.values());
                for (i, row) in rows.iter().enumerate() {
                    scattered[*row as usize * d..][..d].copy_from_slice(&widen(&from.values()[i * d..][..d]));
                }
                let expected = to.becomes("rows", scattered);
                self.check(&format!("scatter {} of {n}x{d}", rows.len()), &[expected], |device| {
                    let mut at = to.array(device)?;
                    let from = device.array(from.values()[..rows.len() * d].to_vec())?;
                    device.scatter(to.of_mut(&mut at), rows, &from)?;
                    Ok(vec![all(device, &at)?])
                })?;
            }
        }
        Ok(())
    }

    pub(super) fn taps(&mut self) -> Result<()> {
        let shapes: &[_] = match self.small {
            true => &[(7, 5, 270, 20)],
            false => &[(7, 5, 3, 0), (1, 30, 300, 100), (40, 9, 72, 160), (700, 50, 5, 3000)],
        };
        for &(rows, sources, d, taps) in shapes {
            let (to, from) = (self.inside(rows, d, 1.0), self.inside(sources, d, 1.0));
            // Some rows take nothing, some much; in no order.
            let weights = self.random.values(taps, 0.5);
            let place = |i: usize| ((i * i + 3 * i) % rows) as u32;
            let list: Vec<_> =
                weights.iter().enumerate().map(|(i, w)| (place(i), (i * 7 % sources) as u32, *w)).collect();
            let mut added = widen(to.values());
            for (row, source, weight) in &list {
                for c in 0..d {
                    added[*row as usize * d + c] +=
                        f64::from(*weight) * f64::from(from.values()[*source as usize * d + c]);
                }
            }
            let taps = Taps::new(rows, list.iter().copied());
            let expected = to.becomes("rows", added);
            self.check(&format!("add_taps {} to {rows}x{d}", list.len()), &[expected], |device| {
                let mut at = to.array(device)?;
                device.add_taps(to.of_mut(&mut at), from.of(&from.array(device)?), &taps)?;
                Ok(vec![all(device, &at)?])
            })?;
        }
        Ok(())
    }

    pub(super) fn pixels(&mut self) -> Result<()> {
        let values = self.random.values(3 * 256, 1.0);
        let mut table = [[0.0; 256]; 3];
        table.as_flattened_mut().copy_from_slice(&values);
        let shapes: &[_] = if self.small { &[(2, 14)] } else { &[(0, 14), (1, 1), (5, 14), (301, 3)] };
        for &(patches, side) in shapes {
            let n = patches * 3 * side * side;
            let bytes: Vec<u8> = (0..n).map(|i| (i * 101 + i / 256 * 7) as u8).collect();
            let value = |(i, byte): (usize, &u8)| f64::from(table[i / (side * side) % 3][*byte as usize]);
            let expected = Expected::all("values", bytes.iter().enumerate().map(value).collect());
            self.check(&format!("pixels of {patches} patches of {side}"), &[expected], |device| {
                Ok(vec![all(device, &device.pixels(&bytes, side, &table)?)?])
            })?;
        }
        Ok(())
    }

    pub(super) fn loss(&mut self) -> Result<()> {
        let shapes: &[_] =
            if self.small { &[(3, 1100)] } else { &[(0, 5), (1, 2), (5, 1000), (3, 5003), (300, 37), (2, 70_001)] };
        for &(n, tokens) in shapes {
            // Rows that lie far from zero, too.
            let logits = self.random.values(n * tokens, 4.0);
            let logits: Vec<f32> =
                logits.iter().enumerate().map(|(i, x)| x + [0.0, 300.0, -300.0][i / tokens % 3]).collect();
            let targets: Vec<(u32, f32)> =
                (0..n).map(|i| ((i * 7919 % tokens) as u32, [0.3, 1.0, 0.0, 2.5][i % 4])).collect();
            let (losses, gradient) = softmax_loss(&widen(&logits), &targets);
            let expected = [Expected::all("losses", losses), Expected::all("gradient", gradient)];
            self.check(&format!("softmax_loss {n}x{tokens}"), &expected, |device| {
                let mut logits = device.array(logits.clone())?;
                let losses = device.softmax_loss(&mut logits, &targets)?;
                Ok(vec![all(device, &losses)?, all(device, &logits)?])
            })?;
        }
        // What is not finite shows.
        let mut logits = self.random.values(2 * 40, 1.0);
        (logits[33], logits[47]) = (f32::NAN, f32::INFINITY);
        let mut logits = self.device.array(logits)?;
        let losses = self.device.softmax_loss(&mut logits, &[(5, 1.0), (6, 1.0)])?;
        let losses = all(self.device, &losses)?;
        self.exact("softmax_loss of what is not finite", losses.iter().all(|loss| !loss.is_finite()));
        Ok(())
    }
}
