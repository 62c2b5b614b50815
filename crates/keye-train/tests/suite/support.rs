//! A tiny 1.5 from the fixtures, and packs of random samples.

use std::path::PathBuf;

use keye_processor::{Overrides, Processor};
use keye_train::{Cpu, Model, PATCH_VALUES, Pack, Params, Precision, load_params};

pub fn fixture() -> PathBuf {
    PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/../../fixtures/keye-1_5-tiny/model"))
}

pub fn processor() -> Processor {
    Processor::load(&fixture(), &Overrides::default()).unwrap()
}

pub fn model() -> Model {
    let processor = processor();
    Model::new(&processor.config, &processor.media.processor, Cpu::detect(), Precision::F32).unwrap()
}

/// The fixture's own weights.
pub fn stored(model: &Model) -> Params {
    let mut params = model.init(1);
    load_params(model, &fixture(), &mut params).unwrap();
    params
}

/// Numbers from a seed.
pub struct Numbers(pub u64);

impl Numbers {
    pub fn below(&mut self, n: u64) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % n
    }

    pub fn float(&mut self) -> f32 {
        self.below(1 << 20) as f32 / (1 << 19) as f32 - 1.0
    }
}

/// A sample: some text, then frames of the given sizes as 1.5 has them, then text that carries loss.
pub fn sample(model: &Model, seed: u64, text: usize, frames: &[[u32; 2]]) -> Pack {
    let mut numbers = Numbers(seed);
    let config = &model.config;
    let mut pack = Pack { cu_seqlens: vec![0], ..Pack::default() };
    let mut next = 0;
    let word = |pack: &mut Pack, next: &mut u32, loss: bool, numbers: &mut Numbers| {
        pack.ids.push(numbers.below(600) as u32);
        pack.loss_mask.push(loss);
        pack.positions.push([*next; 3]);
        *next += 1;
    };
    word(&mut pack, &mut next, false, &mut numbers);
    for [h, w] in frames {
        word(&mut pack, &mut next, false, &mut numbers);
        for (row, col) in (0..h / 2).flat_map(|row| (0..w / 2).map(move |col| (row, col))) {
            pack.ids.push(config.video_token_id);
            pack.loss_mask.push(false);
            pack.positions.push([next, next + row, next + col]);
        }
        next += (h / 2).max(w / 2);
        pack.grids.push([*h, *w]);
        let values = (h * w) as usize * PATCH_VALUES;
        pack.patches.extend((0..values).map(|_| numbers.below(256) as u8));
    }
    (0..text).for_each(|_| word(&mut pack, &mut next, true, &mut numbers));
    pack.cu_seqlens.push(pack.len() as u32);
    pack
}

/// Several samples, one after the other.
pub fn packed(samples: &[Pack]) -> Pack {
    let mut pack = Pack::default();
    samples.iter().for_each(|sample| pack.push(sample));
    pack.check().unwrap();
    pack
}

/// Three texts with a picture each.
pub fn pairs(model: &Model) -> Pack {
    let text = |seed, n| sample(model, seed, n, &[]);
    let mut pack = packed(&[text(1, 5), text(2, 9), text(3, 3)]);
    let images = sample(model, 9, 1, &[[4, 4], [2, 6], [4, 2]]);
    (pack.grids, pack.patches) = (images.grids, images.patches);
    pack
}

pub fn largest_difference(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
}

/// One weight a target.
pub fn weights(pack: &Pack) -> Vec<f32> {
    pack.loss_mask.iter().map(|m| f32::from(*m)).collect()
}
