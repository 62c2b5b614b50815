//! Arrays, operations on single elements, the optimiser's step.

use super::formulas::{gelu, gelu_slope, silu_mul, silu_mul_backward, widen};
use super::{Check, Expected, Inside, Result, Suite, all};
use crate::training::{AdamW, Device, Gelu, Update, View, ViewMut};

impl<D: Device> Suite<'_, D> {
    pub(super) fn arrays(&mut self) -> Result<()> {
        let device = self.device;
        self.exact("lanes", device.lanes() > 0);
        for n in [0, 1, 1037] {
            let values = self.random.values(n, 1.0);
            let array = device.array(values.clone())?;
            self.exact(&format!("array of {n}"), device.len(&array) == n && all(device, &array)? == values);
            let mut zeros = device.zeros(n)?;
            self.exact(&format!("zeros {n}"), all(device, &zeros)? == vec![0.0; n]);
            if n > 0 {
                device.combine(0.5, ViewMut::of(&mut zeros, 1, n), 1.0, View::of(&array, 1, n))?;
                device.clear(&mut zeros)?;
                self.exact(&format!("clear {n}"), all(device, &zeros)? == vec![0.0; n]);
            }
        }
        let part = self.inside(5, 7, 1.0);
        let array = part.array(device)?;
        self.exact("values of a part", device.values(part.of(&array))? == part.values());
        Ok(())
    }

    pub(super) fn elements(&mut self) -> Result<()> {
        let sizes: &[_] = if self.small { &[1030] } else { &[0, 1, 77, 5003] };
        for &n in sizes {
            let (mut to, x) = (self.inside(1, n, 1.0), self.inside(n, 1, 1.0));
            for (a, b) in [(1.0f32, 0.5f32), (0.3, -2.0), (1.0, 1.0), (0.0, 1.0)] {
                if a == 0.0 {
                    // Whatever it was.
                    to.all.fill(f32::NAN);
                }
                let kept = |y: f32| if a == 0.0 { 0.0 } else { f64::from(a) * f64::from(y) };
                let sum = |(y, x): (&f32, &f32)| kept(*y) + f64::from(b) * f64::from(*x);
                let expected = to.becomes("to", to.values().iter().zip(x.values()).map(sum).collect());
                self.check(&format!("combine {a} and {b}, {n}"), &[expected], |device| {
                    let mut at = to.array(device)?;
                    device.combine(a, to.of_mut(&mut at), b, x.of(&x.array(device)?))?;
                    Ok(vec![all(device, &at)?])
                })?;
            }
            let [gate, up, d] = [4.0, 1.0, 1.0].map(|scale| self.random.values(n, scale));
            let wide = [&gate, &up, &d].map(|x| widen(x));
            let product = wide[0].iter().zip(&wide[1]).map(|(gate, up)| silu_mul(*gate, *up)).collect();
            self.check(&format!("silu_mul {n}"), &[Expected::all("product", product)], |device| {
                let product = device.silu_mul(&device.array(gate.clone())?, &device.array(up.clone())?)?;
                Ok(vec![all(device, &product)?])
            })?;
            let (of_gate, of_up) = (0..n).map(|i| silu_mul_backward(wide[0][i], wide[1][i], wide[2][i]).into()).unzip();
            let expected = [Expected::all("gate", of_gate), Expected::all("up", of_up)];
            self.check(&format!("silu_mul {n} reversed"), &expected, |device| {
                let (mut gate, mut up) = (device.array(gate.clone())?, device.array(up.clone())?);
                device.silu_mul_backward(&mut gate, &mut up, &device.array(d.clone())?)?;
                Ok(vec![all(device, &gate)?, all(device, &up)?])
            })?;
            for form in [Gelu::Tanh, Gelu::Erf] {
                let expected = [
                    Expected::all("y", wide[0].iter().map(|z| gelu(form, *z)).collect()),
                    Expected::all("dz", wide[0].iter().zip(&wide[2]).map(|(z, d)| d * gelu_slope(form, *z)).collect()),
                ];
                self.check(&format!("gelu {form:?} {n}"), &expected, |device| {
                    let (z, mut dy) = (device.array(gate.clone())?, device.array(d.clone())?);
                    device.gelu_backward(form, &z, &mut dy)?;
                    Ok(vec![all(device, &device.gelu(form, &z)?)?, all(device, &dy)?])
                })?;
            }
        }
        Ok(())
    }

    pub(super) fn square_sums(&mut self) -> Result<()> {
        let sizes: &[_] = if self.small { &[0, 4100] } else { &[0, 1, 77, 20_011, 4_300_001] };
        for &n in sizes {
            // Squares that f32 would not hold.
            let x = self.inside(1, n, 1e25);
            let expected: f64 = widen(x.values()).iter().map(|x| x.powi(2)).sum();
            let array = x.array(self.device)?;
            let found = self.device.square_sum(x.of(&array))?;
            let error = if n == 0 { found } else { found / expected - 1.0 };
            let error = if error.is_nan() { f32::INFINITY } else { error.abs() as f32 };
            let name = format!("training: square_sum {n}");
            self.checks.push(Check { name, error, tolerance: self.tolerance });
            let again = self.device.square_sum(x.of(&array))?;
            self.exact(&format!("square_sum {n}: again"), found.to_bits() == again.to_bits());
        }
        for spoilt in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            let mut x = self.random.values(5000, 1.0);
            x[4321] = spoilt;
            let found = self.device.square_sum(View::of(&self.device.array(x)?, 1, 5000))?;
            self.exact(&format!("square_sum with {spoilt}"), !found.is_finite());
        }
        Ok(())
    }

    pub(super) fn adamw(&mut self) -> Result<()> {
        let updates = match self.small {
            true => vec![(3..4, 0.1, 0.0), (10..4110, 0.2, 0.5)],
            false => {
                vec![
                    (3..4, 0.1, 0.0),
                    (4..4, 9.0, 9.0),
                    (10..4107, 0.2, 0.5),
                    (4107..4108, 0.3, 0.0),
                    (6001..15_000, 0.1, 0.1),
                ]
            }
        };
        let updates: Vec<Update> = updates.into_iter().map(|(range, lr, decay)| Update { range, lr, decay }).collect();
        let n = if self.small { 4200 } else { 15_011 };
        let step = AdamW { clip: 0.7, betas: [0.9, 0.95], corrections: [1.5, 2.5], eps: 1e-3 };
        let [p, g, m] = [1.0, 2.0, 0.5].map(|scale| self.random.values(n, scale));
        let v: Vec<f32> = self.random.values(n, 1.0).iter().map(|x| x * x).collect();
        for update in &updates {
            let Update { range, lr, decay } = update.clone();
            let [mut new_p, mut new_m, mut new_v] = [const { Vec::new() }; 3];
            for i in range.clone() {
                let [p, g, m, v] = [&p, &g, &m, &v].map(|x| f64::from(x[i]));
                let [clip, b0, b1, c0, c1, eps, lr, decay] = [
                    step.clip,
                    step.betas[0],
                    step.betas[1],
                    step.corrections[0],
                    step.corrections[1],
                    step.eps,
                    lr,
                    decay,
                ]
                .map(f64::from);
                let g = clip * g;
                let (m, v) = (b0 * m + (1.0 - b0) * g, b1 * v + (1.0 - b1) * g * g);
                new_p.push(p - lr * (m * c0 / ((v * c1).sqrt() + eps) + decay * p));
                new_m.push(m);
                new_v.push(v);
            }
            // One update among all of its kind: the others' places are looked at apart.
            let only = std::slice::from_ref(update);
            let part = |all: &Vec<f32>| Inside { all: all.clone(), start: range.start, rows: 1, cols: range.len() };
            let expected = [part(&p).becomes("p", new_p), part(&m).becomes("m", new_m), part(&v).becomes("v", new_v)];
            self.check(&format!("adamw of {range:?}"), &expected, |device| {
                Self::step(device, [&p, &g, &m, &v], step, only)
            })?;
        }
        let one_by_one = updates.iter().try_fold([p.clone(), m.clone(), v.clone()], |[p, m, v], update| {
            let done = Self::step(self.device, [&p, &g, &m, &v], step, std::slice::from_ref(update))?;
            Ok::<_, crate::BackendError>([done[0].clone(), done[1].clone(), done[2].clone()])
        })?;
        let together = Self::step(self.device, [&p, &g, &m, &v], step, &updates)?;
        self.exact("adamw: updates together = one by one", together == one_by_one);
        let nothing = Self::step(self.device, [&p, &g, &m, &v], step, &[])?;
        self.exact("adamw of nothing", nothing == [p, m, v]);
        Ok(())
    }

    fn step(device: &D, [p, g, m, v]: [&Vec<f32>; 4], step: AdamW, updates: &[Update]) -> Result<Vec<Vec<f32>>> {
        let (mut p, g) = (device.array(p.clone())?, device.array(g.clone())?);
        let (mut m, mut v) = (device.array(m.clone())?, device.array(v.clone())?);
        device.adamw(&mut p, &g, &mut m, &mut v, step, updates)?;
        Ok(vec![all(device, &p)?, all(device, &m)?, all(device, &v)?])
    }
}
