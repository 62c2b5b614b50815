//! Training on CUDA against the CPU: on a GPU where there is one, else on its kernels compiled for the CPU.

use keye_backend::training::{Device, View};
use keye_backend::{Cuda, Products};
use keye_train::{Cpu, Gradients, Means, Model, Optimizer, Pack, Params, Precision, groups};

use crate::support::{packed, pairs, processor, sample, stored, weights};

fn model<D: Device>(device: D, precision: Precision) -> Model<D> {
    let processor = processor();
    Model::new(&processor.config, &processor.media.processor, device, precision).unwrap()
}

fn cuda() -> Option<Cuda> {
    Cuda::for_tests(Products::F32)
}

fn all<D: Device>(device: &D, x: &D::Array) -> Vec<f32> {
    device.values(View::of(x, 1, device.len(x))).unwrap().into_owned()
}

/// Loss and all gradients.
fn gradients<D: Device>(
    model: &Model<D>,
    params: &Params,
    loss: impl Fn(&Model<D>, &Params<D::Array>, &mut Gradients<D::Array>) -> f64,
) -> (f64, Vec<f32>) {
    let device = model.device();
    let params = params.clone().onto(device).unwrap();
    let trained = vec![true; model.layout().tensors().len()];
    let mut gradients = Gradients::zeros(device, model.layout(), trained).unwrap();
    let loss = loss(model, &params, &mut gradients);
    (loss, all(device, &gradients.values))
}

/// Tensor by tensor: the difference is small beside the tensor's gradient, or beside that of the whole model.
fn compare(model: &Model, name: &str, tolerance: f64, want: (f64, Vec<f32>), found: (f64, Vec<f32>)) {
    let off = (want.0 - found.0).abs() / want.0.abs();
    assert!(off < tolerance, "{name}: loss {} on the CPU, {} here", want.0, found.0);
    let length = |values: &mut dyn Iterator<Item = f32>| values.map(|v| f64::from(v).powi(2)).sum::<f64>().sqrt();
    let whole = length(&mut want.1.iter().copied());
    assert!(whole > 0.0 && want.1.len() == found.1.len());
    for (i, tensor) in model.layout().tensors().iter().enumerate() {
        let range = model.layout().range(i);
        let (want, found) = (&want.1[range.clone()], &found.1[range]);
        let off = length(&mut want.iter().zip(found).map(|(a, b)| a - b));
        let size = length(&mut want.iter().copied());
        assert!(off <= tolerance * size + 1e-6 * whole, "{name}, {}: off by {off} of {size}", tensor.name);
    }
}

fn pack(model: &Model) -> Pack {
    packed(&[sample(model, 11, 12, &[[4, 2], [2, 2]]), sample(model, 12, 9, &[]), sample(model, 13, 5, &[[2, 6]])])
}

#[test]
fn cuda_gradients_equal_those_of_the_cpu() {
    let Some(cuda) = cuda() else { return };
    // The sums of bf16 operands differ by order alone, but a value that is rounded the other way moves all that follows.
    for (precision, tolerance) in [(Precision::F32, 1e-4), (Precision::Bf16, 2e-2)] {
        let (cpu, gpu) = (model(Cpu::detect(), precision), model(cuda.clone(), precision));
        let params = cpu.init(2);
        let pack = pack(&cpu);
        let weights = weights(&pack);
        let want = gradients(&cpu, &params, |m, p, g| m.next_token(p, Some(g), &pack, &weights, 0.5).unwrap());
        let found = gradients(&gpu, &params, |m, p, g| m.next_token(p, Some(g), &pack, &weights, 0.5).unwrap());
        let again = gradients(&gpu, &params, |m, p, g| m.next_token(p, Some(g), &pack, &weights, 0.5).unwrap());
        assert!(found == again, "{precision:?}: the same twice");
        compare(&cpu, &format!("{precision:?}"), tolerance, want, found);
    }
}

#[test]
fn cuda_contrastive_gradients_equal_those_of_the_cpu() {
    let Some(cuda) = cuda() else { return };
    let (cpu, gpu) = (model(Cpu::detect(), Precision::F32), model(cuda, Precision::F32));
    let mut params = cpu.init(2);
    params.tensor_mut("siglip.logit_bias").unwrap()[0] = -1.0;
    let pack = pairs(&cpu);
    let want = gradients(&cpu, &params, |m, p, g| m.contrastive(p, Some(g), &pack, 1.0).unwrap());
    let found = gradients(&gpu, &params, |m, p, g| m.contrastive(p, Some(g), &pack, 1.0).unwrap());
    compare(&cpu, "contrastive", 1e-4, want, found);
}

/// Three steps, with frozen tensors and clipping.
fn trained<D: Device>(model: &Model<D>, start: &Params, pack: &Pack, optimizer: Optimizer) -> (Vec<f64>, Vec<f32>) {
    let device = model.device();
    let layout = model.layout();
    let mut params = start.clone().onto(device).unwrap();
    let flags = layout.tensors().iter().map(|t| !t.name.starts_with("mlp_AR.pre_norm")).collect();
    let mut gradients = Gradients::zeros(device, layout, flags).unwrap();
    let mut means = Means::new(layout).onto(device).unwrap();
    let groups = groups(layout, optimizer, 0.1, 0.1);
    let weights = weights(pack);
    let losses = (0..3).map(|_| {
        device.clear(&mut gradients.values).unwrap();
        let loss = model.next_token(&params, Some(&mut gradients), pack, &weights, 0.05).unwrap();
        let norm = means.step(device, &mut params, &gradients, &groups, 1e-3, 0.1).unwrap();
        assert!(norm > 0.1, "clipped");
        loss
    });
    (losses.collect(), all(device, &params.values))
}

#[test]
fn cuda_steps_equal_those_of_the_cpu() {
    let Some(cuda) = cuda() else { return };
    for optimizer in [Optimizer::AdamW, Optimizer::Muon] {
        let (cpu, gpu) = (model(Cpu::detect(), Precision::F32), model(cuda.clone(), Precision::F32));
        let start = stored(&cpu);
        let pack = pack(&cpu);
        let (want_losses, want) = trained(&cpu, &start, &pack, optimizer);
        let (losses, found) = trained(&gpu, &start, &pack, optimizer);
        assert!(want_losses[2] < want_losses[0], "{want_losses:?}");
        for (want, found) in want_losses.iter().zip(&losses) {
            assert!((want - found).abs() < 2e-3 * want, "{optimizer:?}: {want_losses:?} {losses:?}");
        }
        // AdamW's first steps are as large for a small gradient as for a large one, so the largest difference tells nothing.
        let moved =
            |values: &[f32]| values.iter().zip(&start.values).map(|(a, b)| f64::from(a - b)).collect::<Vec<_>>();
        let (want, found) = (moved(&want), moved(&found));
        let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
        let cosine = dot(&want, &found) / (dot(&want, &want) * dot(&found, &found)).sqrt();
        assert!(cosine > 0.995, "{optimizer:?}: {cosine}");
    }
}
