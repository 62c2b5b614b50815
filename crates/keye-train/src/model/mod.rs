//! The 1.5 model with its reverse pass.

pub(crate) mod contrast;
mod decoder;
mod init;
mod loss;
mod vision;

use std::sync::Arc;

use keye_backend::training::{Device, Precision, Span, View, ViewMut};
use keye_media::ProcessorConfig;
use keye_processor::{ModelConfig, Variant};

use crate::params::{Gradients, Layout, Params};
use crate::{Cpu, Pack, TrainError};
use contrast::Contrast;
use decoder::Decoder;
use vision::{Projector, Vision};

/// The model's structure, on the device that computes it; values are in [`Params`].
pub struct Model<D = Cpu> {
    /// Dimensions and token ids.
    pub config: ModelConfig,
    layout: Arc<Layout>,
    device: D,
    vision: Vision,
    projector: Projector,
    decoder: Decoder,
    contrast: Contrast,
    /// The reverse computes each layer again from its input instead of keeping all that it computed.
    pub recompute: bool,
}

impl<D: Device> Model<D> {
    /// The model of a config.json; `processor` says how bytes become pixel values. Errors: not a dense 1.5.
    pub fn new(
        config: &ModelConfig,
        processor: &ProcessorConfig,
        device: D,
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
            device,
            recompute: false,
        })
    }

    /// What lies where in parameters and gradients.
    pub fn layout(&self) -> &Arc<Layout> {
        &self.layout
    }

    /// What computes.
    pub fn device(&self) -> &D {
        &self.device
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

    fn pads(&self, pack: &Pack) -> Result<Vec<u32>, TrainError> {
        let pad = |id: u32| id == self.config.image_token_id || id == self.config.video_token_id;
        let pads: Vec<u32> = (0..pack.len() as u32).filter(|i| pad(pack.ids[*i as usize])).collect();
        let features: u64 = pack.grids.iter().map(|[h, w]| u64::from(*h) * u64::from(*w) / 4).sum();
        if pads.len() as u64 != features {
            return Err(TrainError::Pack(format!("{} pad tokens for {features} features", pads.len())));
        }
        Ok(pads)
    }

    /// Logits of every token, `[n, V]`.
    pub fn logits(&self, params: &Params<D::Array>, pack: &Pack) -> Result<Vec<f32>, TrainError> {
        let (device, h) = (&self.device, self.config.text.hidden_size);
        self.check(pack)?;
        let pads = self.pads(pack)?;
        let mut x = self.decoder.embed(device, params, &pack.ids)?;
        if !pads.is_empty() {
            let (patches, _) = self.vision.forward(device, params, pack, true)?;
            let (features, _) = self.projector.forward(device, params, &patches, &pack.grids)?;
            device.scatter(ViewMut::of(&mut x, pack.len(), h), &pads, &features)?;
        }
        let spans = device.spans(self_spans(&pack.cu_seqlens))?;
        let (x, _) = self.decoder.forward(device, params, x, &pack.positions, spans, true)?;
        Ok(loss::logits(device, params, &self.decoder, &x)?)
    }

    /// `sum w_i (-log p(token_i))` over tokens of non-zero weight `[n]`; with gradients, adds `scale` times theirs.
    pub fn next_token(
        &self,
        params: &Params<D::Array>,
        mut gradients: Option<&mut Gradients<D::Array>>,
        pack: &Pack,
        weights: &[f32],
        scale: f32,
    ) -> Result<f64, TrainError> {
        let (device, h) = (&self.device, self.config.text.hidden_size);
        self.check(pack)?;
        let pads = self.pads(pack)?;
        let recompute = self.recompute || gradients.is_none();
        let mut x = self.decoder.embed(device, params, &pack.ids)?;
        let vision = match pads.is_empty() {
            true => None,
            false => {
                let (patches, trace) = self.vision.forward(device, params, pack, recompute)?;
                let (features, projector) = self.projector.forward(device, params, &patches, &pack.grids)?;
                device.scatter(ViewMut::of(&mut x, pack.len(), h), &pads, &features)?;
                Some((trace, projector))
            }
        };
        let spans = device.spans(self_spans(&pack.cu_seqlens))?;
        let (x, trace) = self.decoder.forward(device, params, x, &pack.positions, spans, recompute)?;
        let targets = loss::targets(&pack.ids, weights);
        let (sum, dx) =
            loss::cross_entropy(device, params, gradients.as_deref_mut(), &self.decoder, &x, &targets, scale)?;
        let (Some(gradients), Some(dx)) = (gradients, dx) else { return Ok(sum) };
        let dx = self.decoder.backward(device, params, gradients, trace, dx)?;
        self.decoder.embed_backward(device, gradients, &pack.ids, &pads, &dx)?;
        if let Some((vision, projector)) = vision
            && (self.trains(gradients, "mlp_AR.") || self.trains(gradients, "visual."))
        {
            let dfeatures = device.gather(View::of(&dx, pack.len(), h), &pads)?;
            let below = self.trains(gradients, "visual.");
            let dpatches = self.projector.backward(device, params, gradients, projector, &dfeatures, below)?;
            if let Some(dpatches) = dpatches {
                self.vision.backward(device, params, gradients, vision, &dpatches)?;
            }
        }
        Ok(sum)
    }

    /// SigLIP's loss over a pack whose segment i is the text of image i; with gradients, adds `scale` times theirs.
    pub fn contrastive(
        &self,
        params: &Params<D::Array>,
        mut gradients: Option<&mut Gradients<D::Array>>,
        pack: &Pack,
        scale: f32,
    ) -> Result<f64, TrainError> {
        let (device, h) = (&self.device, self.config.text.hidden_size);
        self.check(pack)?;
        let (images, texts) = (pack.grids.len(), pack.cu_seqlens.len() - 1);
        if images != texts {
            return Err(TrainError::Pack(format!("{images} images for {texts} texts; as many are expected")));
        }
        let recompute = self.recompute || gradients.is_none();
        let (patches, vision) = self.vision.forward(device, params, pack, recompute)?;
        let x = self.decoder.embed(device, params, &pack.ids)?;
        let spans = device.spans(self_spans(&pack.cu_seqlens))?;
        let (x, trace) = self.decoder.forward(device, params, x, &pack.positions, spans, recompute)?;
        let (normed, stats) = self.decoder.norm.forward(device, params, &x)?;
        let of_means = loss::segment_means(&pack.cu_seqlens);
        let means = loss::weighted_sums(device, &normed, h, texts, of_means.iter().copied())?;
        let step = self.contrast.step(device, params, gradients.as_deref_mut(), pack, &patches, &means, scale)?;
        let (loss, Some([dpatches, dmeans])) = step else { return Ok(step.0) };
        let Some(gradients) = gradients else { return Ok(loss) };
        if self.trains(gradients, "visual.") {
            self.vision.backward(device, params, gradients, vision, &dpatches)?;
        }
        if self.trains(gradients, "model.") {
            let back = of_means.iter().map(|(segment, row, weight)| (*row, *segment, *weight));
            let dnormed = loss::weighted_sums(device, &dmeans, h, pack.len(), back)?;
            let mut dx = device.zeros(device.len(&x))?;
            self.decoder.norm.backward(device, params, gradients, &x, &stats, &dnormed, &mut dx)?;
            let dx = self.decoder.backward(device, params, gradients, trace, dx)?;
            self.decoder.embed_backward(device, gradients, &pack.ids, &[], &dx)?;
        }
        Ok(loss)
    }

    /// Whether a tensor is stage 0's and no part of the model that the engine runs.
    pub(crate) fn is_extra(&self, name: &str) -> bool {
        contrast::is_extra(name)
    }

    fn trains(&self, gradients: &Gradients<D::Array>, prefix: &str) -> bool {
        let named = |(tensor, trained): (&keye_model::TensorShape, &bool)| *trained && tensor.name.starts_with(prefix);
        self.layout.tensors().iter().zip(gradients.trained()).any(named)
    }
}

/// The spans that boundaries `0, .., n` cut.
fn self_spans(cu_seqlens: &[u32]) -> Vec<Span> {
    let span = |w: &[u32]| {
        let rows = w[0] as usize..w[1] as usize;
        Span { queries: rows.clone(), keys: rows }
    };
    cu_seqlens.windows(2).map(span).collect()
}
