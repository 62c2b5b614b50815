//! The reverse pass against differences of the forward pass.

use keye_backend::Isa;
use keye_train::{Cpu, Gradients, Model, Pack, Params, Precision, sigmoid_loss};

use crate::support::{Numbers, model, packed, pairs, processor, sample, stored, weights};

/// Zeros for all tensors.
fn all_gradients(model: &Model) -> Gradients {
    let trained = vec![true; model.layout().tensors().len()];
    Gradients::zeros(model.device(), model.layout(), trained).unwrap()
}

/// Compares every tensor's gradient with the change of the loss along a random direction of that tensor.
fn check(model: &Model, params: &Params, loss: &mut dyn FnMut(&Params, Option<&mut Gradients>) -> f64) {
    let layout = model.layout();
    let mut gradients = all_gradients(model);
    let value = loss(params, Some(&mut gradients));
    assert!(value.is_finite() && value != 0.0);
    assert_eq!(value, loss(params, None), "the loss does not depend on whether gradients are wanted");
    let mut numbers = Numbers(5);
    let mut reached = 0;
    for (i, tensor) in layout.tensors().iter().enumerate() {
        let gradient = &gradients.values[layout.range(i)];
        let length = gradient.iter().map(|g| f64::from(*g).powi(2)).sum::<f64>().sqrt();
        if length == 0.0 {
            continue;
        }
        reached += 1;
        // The first and the last layer stand for those between them.
        if tensor.name.contains("layers.1.") || tensor.name.contains("layers.2.") && !tensor.name.contains("visual") {
            continue;
        }
        // Half along the gradient, half anywhere, scaled to the tensor's own size.
        // but small where the loss bends quickly.
        let size = (params.values[layout.range(i)].iter().map(|v| f64::from(*v).powi(2)).sum::<f64>()).sqrt().max(0.1);
        let size = size.min(2.0 * value.abs() / length);
        let random: Vec<f64> = gradient.iter().map(|_| f64::from(numbers.float())).collect();
        let random_length = random.iter().map(|v| v * v).sum::<f64>().sqrt();
        let direction: Vec<f64> =
            (gradient.iter().zip(&random)).map(|(g, r)| size * (f64::from(*g) / length + r / random_length)).collect();
        let slope: f64 = gradient.iter().zip(&direction).map(|(g, d)| f64::from(*g) * d).sum();
        let mut at = |step: f64| {
            let mut moved = params.clone();
            for (v, d) in moved.values[layout.range(i)].iter_mut().zip(&direction) {
                *v = (f64::from(*v) + step * d) as f32;
            }
            loss(&moved, None)
        };
        let e = 3e-3;
        let measured = (at(e) - at(-e)) / (2.0 * e);
        let noise = 2e-6 * value.abs() / e;
        assert!(
            (measured - slope).abs() < 5e-3 * slope.abs() + noise,
            "{}: gradient {slope}, difference {measured}",
            tensor.name
        );
    }
    assert!(reached > 60, "only {reached} tensors have a gradient");
}

fn pack(model: &Model) -> Pack {
    packed(&[sample(model, 11, 12, &[[4, 2], [2, 2]]), sample(model, 12, 9, &[]), sample(model, 13, 5, &[[2, 6]])])
}

#[test]
fn next_token_gradients_equal_differences() {
    let model = model();
    let params = model.init(2);
    let pack = pack(&model);
    let weights = weights(&pack);
    check(&model, &params, &mut |params, gradients| model.next_token(params, gradients, &pack, &weights, 1.0).unwrap());
}

/// Operands of eight bits of mantissa change gradients by some thousandths, and the model stays the same one.
#[test]
fn gradients_in_mixed_precision_are_near_those_in_f32() {
    let processor = processor();
    let mixed = Model::new(&processor.config, &processor.media.processor, Cpu::detect(), Precision::Bf16).unwrap();
    let exact = model();
    let params = exact.init(2);
    let pack = pack(&exact);
    let weights = weights(&pack);
    let of = |model: &Model| {
        let mut gradients = all_gradients(model);
        let loss = model.next_token(&params, Some(&mut gradients), &pack, &weights, 1.0).unwrap();
        (loss, gradients.values)
    };
    let ((loss, want), (near, found)) = (of(&exact), of(&mixed));
    assert!(loss != near && (loss - near).abs() < 1e-2 * loss, "{loss} {near}");
    let square = |values: &mut dyn Iterator<Item = f32>| values.map(|v| f64::from(v).powi(2)).sum::<f64>();
    let off = square(&mut want.iter().zip(&found).map(|(a, b)| a - b)) / square(&mut want.iter().copied());
    assert!(off > 0.0 && off.sqrt() < 0.03, "{}", off.sqrt());
}

#[test]
fn contrastive_gradients_equal_differences() {
    let model = model();
    let mut params = model.init(2);
    // As SigLIP begins, the bias hides everything else.
    params.tensor_mut("siglip.logit_bias").unwrap()[0] = -1.0;
    let pack = pairs(&model);
    check(&model, &params, &mut |params, gradients| model.contrastive(params, gradients, &pack, 1.0).unwrap());
}

#[test]
fn gradients_do_not_depend_on_threads_nor_on_recomputation() {
    let mut model = model();
    let params = stored(&model);
    let pack = pack(&model);
    let weights = weights(&pack);
    let run = |model: &Model, threads: usize| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        let mut gradients = all_gradients(model);
        let loss = pool.install(|| model.next_token(&params, Some(&mut gradients), &pack, &weights, 0.5).unwrap());
        (loss, gradients.values)
    };
    let (loss, gradients) = run(&model, 1);
    assert!(gradients.iter().any(|g| *g != 0.0));
    let same = |(l, g): (f64, Vec<f32>)| l == loss && g.iter().zip(&gradients).all(|(a, b)| a.to_bits() == b.to_bits());
    assert!(same(run(&model, 2)), "two threads");
    assert!(same(run(&model, 5)), "five threads");
    model.recompute = true;
    assert!(same(run(&model, 2)), "recomputation");
}

#[test]
fn frozen_tensors_gather_no_gradient() {
    let model = model();
    let params = stored(&model);
    let pack = pack(&model);
    let weights = weights(&pack);
    let only = |prefix: &str| {
        let trained = model.layout().tensors().iter().map(|t| t.name.starts_with(prefix)).collect();
        let mut gradients = Gradients::zeros(model.device(), model.layout(), trained).unwrap();
        model.next_token(&params, Some(&mut gradients), &pack, &weights, 1.0).unwrap();
        gradients.values
    };
    let all = only("");
    for prefix in ["visual.", "mlp_AR.", "model.", "lm_head."] {
        let some = only(prefix);
        for (i, tensor) in model.layout().tensors().iter().enumerate() {
            let range = model.layout().range(i);
            match tensor.name.starts_with(prefix) {
                true => assert_eq!(some[range.clone()], all[range], "{}", tensor.name),
                false => assert!(some[range].iter().all(|g| *g == 0.0), "{}", tensor.name),
            }
        }
    }
}

/// Acceptance test 1 (spec §9), by hand: t' = ln 2, b = -1, cosines 0.6 and 0.8.
#[test]
fn sigmoid_loss_equals_hand_computation_and_its_gathered_value() {
    let x = [1.0, 0.0, 0.0, 1.0];
    let y = [0.6, 0.8, 0.8, -0.6];
    // Arguments s_ij = 2 <x_i, y_j> - 1: 0.2 and 0.6 above, 0.6 and -2.2 below.
    let log_sigmoid = |z: f64| -(1.0 + (-z).exp()).ln();
    let want = -(log_sigmoid(0.2) + log_sigmoid(-0.6) + log_sigmoid(-0.6) + log_sigmoid(-2.2)) / 2.0;
    let whole = sigmoid_loss(Isa::detect(), &x, &y, 2, 2f32.ln(), -1.0, 2);
    assert!((whole.loss - want).abs() < 1e-6, "{} {want}", whole.loss);
    let chunked = sigmoid_loss(Isa::detect(), &x, &y, 2, 2f32.ln(), -1.0, 1);
    assert!((chunked.loss - whole.loss).abs() < 1e-12);
    for (a, b) in chunked.dx.iter().chain(&chunked.dy).zip(whole.dx.iter().chain(&whole.dy)) {
        assert!((a - b).abs() < 1e-6);
    }
}
