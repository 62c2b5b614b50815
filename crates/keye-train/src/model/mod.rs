//! The 1.5 model with its reverse pass.

pub(crate) mod contrast;
mod decoder;
mod init;
mod loss;
mod vision;

use std::sync::Arc;

use keye_backend::Isa;
use keye_media::ProcessorConfig;
use keye_processor::{ModelConfig, Variant};

use crate::ops::attention::self_spans;
use crate::ops::linear::Precision;
use crate::params::{Gradients, Layout, Params};
use crate::{Pack, TrainError};
use contrast::Contrast;
use decoder::Decoder;
use vision::{Projector, Vision};

/// The model's structure; values are in [`Params`].
pub struct Model {
    /// Dimensions and token ids.
    pub config: ModelConfig,
    layout: Arc<Layout>,
    isa: Isa,
    vision: Vision,
    projector: Projector,
    decoder: Decoder,
    contrast: Contrast,
    /// The reverse computes each layer again from its input instead of keeping all that it computed.
    pub recompute: bool,
}

impl Model {
    /// The model of a config.json; `processor` says how bytes become pixel values. Errors: not a dense 1.5.
    pub fn new(
        config: &ModelConfig,
        processor: &ProcessorConfig,
        isa: Isa,
        precision: Precision,
    ) -> Result<Self, TrainError> {
        if config.variant != Variant::V1_5 {
            return Err(TrainError::Model(format!(
                "{} is not trained; a Keye-VL-1.5 is expected",
                config.architecture
            )));
        }
        let mut tensors = keye_model::weight_layout(config);
        tensors.extend(contrast::tensors(config));
        let layout = Arc::new(Layout::new(tensors));
        Ok(Self {
            vision: Vision::new(&layout, &config.vision, processor, precision)?,
            projector: Projector::new(&layout, precision)?,
            decoder: Decoder::new(&layout, &config.text, precision)?,
            contrast: Contrast::new(&layout, config, precision)?,
            config: config.clone(),
            layout,
            isa,
            recompute: false,
        })
    }

    /// What lies where in parameters and gradients.
    pub fn layout(&self) -> &Arc<Layout> {
        &self.layout
    }

    /// The instructions it computes with.
    pub fn isa(&self) -> Isa {
        self.isa
    }

    /// Random values: matrices normal with deviation `1/sqrt(inputs)`, embeddings 0.02, norms 1, biases 0.
    pub fn init(&self, seed: u64) -> Params {
        init::init(&self.layout, self.config.text.num_hidden_layers, seed)
    }

    /// Adds coordinates to the tower's position embeddings (`sines` of a recipe). Error: a model without such a table.
    pub fn add_sines(&self, params: &mut Params, amplitude: f32) -> Result<(), TrainError> {
        init::add_sines(params, amplitude)
    }

    /// Checks a pack against itself and the model.
    pub fn check(&self, pack: &Pack) -> Result<(), TrainError> {
        pack.check()?;
        if let Some(id) = pack.ids.iter().find(|id| **id as usize >= self.config.text.vocab_size) {
            let vocab = self.config.text.vocab_size;
            return Err(TrainError::Pack(format!("token {id}, the vocabulary has {vocab}")));
        }
        Ok(())
    }

    fn pads(&self, pack: &Pack) -> Result<Vec<usize>, TrainError> {
        let pad = |id: u32| id == self.config.image_token_id || id == self.config.video_token_id;
        let pads: Vec<usize> = (0..pack.len()).filter(|i| pad(pack.ids[*i])).collect();
        let features: u64 = pack.grids.iter().map(|[h, w]| u64::from(*h) * u64::from(*w) / 4).sum();
        if pads.len() as u64 != features {
            return Err(TrainError::Pack(format!("{} pad tokens for {features} features", pads.len())));
        }
        Ok(pads)
    }

    /// Logits of every token, `[n, V]`.
    pub fn logits(&self, params: &Params, pack: &Pack) -> Result<Vec<f32>, TrainError> {
        let (isa, h) = (self.isa, self.config.text.hidden_size);
        self.check(pack)?;
        let pads = self.pads(pack)?;
        let mut x = self.decoder.embed(params, &pack.ids);
        if !pads.is_empty() {
            let (patches, _) = self.vision.forward(isa, params, pack, true);
            let (features, _) = self.projector.forward(isa, params, &patches, &pack.grids);
            replace(&mut x, &features, &pads, h);
        }
        let spans = self_spans(&pack.cu_seqlens);
        let (x, _) = self.decoder.forward(isa, params, x, &pack.positions, spans, true);
        Ok(loss::logits(isa, params, &self.decoder, &x))
    }

    /// `sum w_i (-log p(token_i))` over tokens of non-zero weight `[n]`; with gradients, adds `scale` times theirs.
    pub fn next_token(
        &self,
        params: &Params,
        mut gradients: Option<&mut Gradients>,
        pack: &Pack,
        weights: &[f32],
        scale: f32,
    ) -> Result<f64, TrainError> {
        let (isa, h) = (self.isa, self.config.text.hidden_size);
        self.check(pack)?;
        let pads = self.pads(pack)?;
        let recompute = self.recompute || gradients.is_none();
        let mut x = self.decoder.embed(params, &pack.ids);
        let vision = (!pads.is_empty()).then(|| {
            let (patches, trace) = self.vision.forward(isa, params, pack, recompute);
            let (features, projector) = self.projector.forward(isa, params, &patches, &pack.grids);
            replace(&mut x, &features, &pads, h);
            (trace, projector)
        });
        let spans = self_spans(&pack.cu_seqlens);
        let (x, trace) = self.decoder.forward(isa, params, x, &pack.positions, spans, recompute);
        let targets = loss::targets(&pack.ids, weights);
        let (sum, dx) = loss::cross_entropy(isa, params, gradients.as_deref_mut(), &self.decoder, &x, &targets, scale);
        let (Some(gradients), Some(dx)) = (gradients, dx) else { return Ok(sum) };
        let dx = self.decoder.backward(isa, params, gradients, trace, dx);
        self.decoder.embed_backward(isa, gradients, &pack.ids, &pads, &dx);
        if let Some((vision, projector)) = vision
            && (self.trains(gradients, "mlp_AR.") || self.trains(gradients, "visual."))
        {
            let dfeatures: Vec<f32> = pads.iter().flat_map(|row| &dx[row * h..(row + 1) * h]).copied().collect();
            let below = self.trains(gradients, "visual.");
            let dpatches = self.projector.backward(isa, params, gradients, projector, &dfeatures, below);
            if let Some(dpatches) = dpatches {
                self.vision.backward(isa, params, gradients, vision, &dpatches);
            }
        }
        Ok(sum)
    }

    /// SigLIP's loss over a pack whose segment i is the text of image i; with gradients, adds `scale` times theirs.
    pub fn contrastive(
        &self,
        params: &Params,
        mut gradients: Option<&mut Gradients>,
        pack: &Pack,
        scale: f32,
    ) -> Result<f64, TrainError> {
        let (isa, h) = (self.isa, self.config.text.hidden_size);
        self.check(pack)?;
        let (images, texts) = (pack.grids.len(), pack.cu_seqlens.len() - 1);
        if images != texts {
            return Err(TrainError::Pack(format!("{images} images for {texts} texts; as many are expected")));
        }
        let recompute = self.recompute || gradients.is_none();
        let (patches, vision) = self.vision.forward(isa, params, pack, recompute);
        let x = self.decoder.embed(params, &pack.ids);
        let spans = self_spans(&pack.cu_seqlens);
        let (x, trace) = self.decoder.forward(isa, params, x, &pack.positions, spans, recompute);
        let (normed, stats) = self.decoder.norm.forward(isa, params, &x);
        let means = loss::segment_means(isa, &normed, h, &pack.cu_seqlens);
        let step = self.contrast.step(isa, params, gradients.as_deref_mut(), pack, &patches, &means, scale);
        let (loss, Some([dpatches, dmeans])) = step else { return Ok(step.0) };
        let Some(gradients) = gradients else { return Ok(loss) };
        if self.trains(gradients, "visual.") {
            self.vision.backward(isa, params, gradients, vision, &dpatches);
        }
        if self.trains(gradients, "model.") {
            let mut dnormed = vec![0.0; x.len()];
            for (i, rows) in pack.cu_seqlens.windows(2).enumerate() {
                let count = (rows[1] - rows[0]) as f32;
                for row in dnormed[rows[0] as usize * h..rows[1] as usize * h].chunks_exact_mut(h) {
                    row.iter_mut().zip(&dmeans[i * h..(i + 1) * h]).for_each(|(to, from)| *to = from / count);
                }
            }
            let mut dx = vec![0.0; x.len()];
            self.decoder.norm.backward(isa, params, gradients, &x, &stats, &dnormed, &mut dx);
            let dx = self.decoder.backward(isa, params, gradients, trace, dx);
            self.decoder.embed_backward(isa, gradients, &pack.ids, &[], &dx);
        }
        Ok(loss)
    }

    /// Whether a tensor is stage 0's and no part of the model that the engine runs.
    pub(crate) fn is_extra(&self, name: &str) -> bool {
        contrast::is_extra(name)
    }

    fn trains(&self, gradients: &Gradients, prefix: &str) -> bool {
        let named = |(tensor, trained): (&keye_model::TensorShape, &bool)| *trained && tensor.name.starts_with(prefix);
        self.layout.tensors().iter().zip(gradients.trained()).any(named)
    }
}

/// Puts features in the place of the rows of pad tokens.
fn replace(x: &mut [f32], features: &[f32], pads: &[usize], h: usize) {
    for (row, feature) in pads.iter().zip(features.chunks_exact(h)) {
        x[row * h..(row + 1) * h].copy_from_slice(feature);
    }
}
