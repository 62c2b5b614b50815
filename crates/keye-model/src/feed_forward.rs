//! The feed-forward block of a decoder layer: dense, or a mixture of experts (spec of 2.0, §2.2 and §6; of 671B, §4).
//!
//! Ranks divide a dense block by its width and a mixture by experts: whole experts stay where they lie in the checkpoint,
//! in every layout, and may wait on the disk. A token's experts are then unevenly spread over the ranks.

use std::ops::Range;

use keye_backend::{Backend, BackendError, Dtype, Expert, GroupedRouting, WeightSource};
use keye_processor::{ExpertsConfig, TextConfig};

use crate::ranks::Peers;
use crate::tap::record;
use crate::weights::Weights;
use crate::{ModelError, Tap};

pub(crate) enum FeedForward<B: Backend> {
    Dense(Expert<B::Weight>),
    Experts {
        config: ExpertsConfig,
        /// `[E, H]`
        router: B::Weight,
        /// `[E]`, of experts that are chosen by groups.
        choice_bias: Option<B::Weight>,
        /// This rank's.
        experts: Vec<Expert<B::Weight>>,
        /// Number of the first of them.
        first_expert: usize,
        /// Every row's.
        shared: Option<Expert<B::Weight>>,
    },
}

impl<B: Backend> FeedForward<B> {
    pub(crate) fn load(mlp: &Weights<'_, B>, text: &TextConfig, layer: usize) -> Result<Self, ModelError> {
        let h = text.hidden_size;
        let Some(config) = text.experts.filter(|experts| experts.is_in_layer(layer)) else {
            return Ok(Self::Dense(dense(mlp, text.intermediate_size, h)?));
        };
        let router = mlp.matrix("gate.weight", config.num_experts, h)?;
        let stored = mlp.at("experts");
        let own = mlp.shard().experts(config.num_experts);
        let first_expert = own.start;
        let experts = match stored.has("gate_up_proj") {
            true => fused(&stored, &config, h, own)?,
            false => one_by_one(&stored, config.moe_intermediate_size, h, own)?,
        };
        let choice_bias = match config.groups {
            Some(_) => Some(mlp.vector("gate.e_score_correction_bias", config.num_experts)?),
            None => None,
        };
        let shared = match config.n_shared_experts {
            0 => None,
            n => Some(dense(&mlp.at("shared_experts"), n * config.moe_intermediate_size, h)?),
        };
        Ok(Self::Experts { config, router, choice_bias, experts, first_expert, shared })
    }

    /// `x += ffn(h)` for the rows `h [n, H]`.
    pub(crate) fn add(
        &self,
        backend: &B,
        peers: &Peers<B>,
        h: &B::Tensor,
        x: &mut B::Tensor,
        layer: usize,
        tap: &mut dyn Tap,
    ) -> Result<(), BackendError> {
        match self {
            Self::Dense(dense) => peers.add(backend, x, |x| add_dense(backend, dense, h, x)),
            Self::Experts { config, router, choice_bias, experts, first_expert, shared } => {
                let count = config.num_experts_per_tok;
                let (chosen, weights) = match (config.groups, choice_bias) {
                    (Some(groups), Some(bias)) => {
                        let routing = GroupedRouting {
                            count,
                            groups: groups.n_group,
                            chosen_groups: groups.topk_group,
                            normalise: config.norm_topk_prob,
                            scale: groups.routed_scaling_factor,
                        };
                        backend.route_grouped(h, router, bias, routing)?
                    }
                    _ => backend.route(h, router, count, config.norm_topk_prob)?,
                };
                let name = format!("router_index.{layer}");
                if tap.wants(&name) {
                    let values: Vec<f32> = backend.download_index(&chosen)?.into_iter().map(|e| e as f32).collect();
                    tap.record(&name, count, &values);
                }
                record(backend, tap, format_args!("router_weight.{layer}"), &weights)?;
                let own = match experts.len() == config.num_experts {
                    true => chosen,
                    false => backend.own_experts(&chosen, *first_expert..first_expert + experts.len())?,
                };
                let add = |x: &mut B::Tensor| {
                    backend.add_experts(h, experts, &own, &weights, x)?;
                    match shared {
                        Some(shared) => add_dense(backend, shared, h, x),
                        None => Ok(()),
                    }
                };
                let name = format!("moe_out.{layer}");
                if tap.wants(&name) {
                    let mut out = backend.zeros(backend.rows(h), backend.cols(x))?;
                    peers.add(backend, &mut out, add)?;
                    tap.record(&name, backend.cols(x), &backend.download(&out)?);
                }
                peers.add(backend, x, add)
            }
        }
    }
}

/// `x += down(silu(gate h) * (up h))`
fn add_dense<B: Backend>(
    backend: &B,
    dense: &Expert<B::Weight>,
    h: &B::Tensor,
    x: &mut B::Tensor,
) -> Result<(), BackendError> {
    let h = backend.gated(h, &dense.gate, &dense.up)?;
    backend.linear_add(&h, &dense.down, None, x)
}

/// The experts `own` of a layer, each `gate_proj`, `up_proj` `[width, H]` and `down_proj` `[H, width]`.
///
/// Their products are made together, so gates and ups have to go with the same form of activations, and so have downs.
fn one_by_one<B: Backend>(
    stored: &Weights<'_, B>,
    width: usize,
    h: usize,
    own: Range<usize>,
) -> Result<Vec<Expert<B::Weight>>, ModelError> {
    // Name and type of the first gate and of the first down.
    let mut first: [Option<(String, Dtype)>; 2] = [None, None];
    own.map(|e| {
        let at = stored.at(e);
        let mut load = |part: usize, name: &str, rows: usize, cols: usize| {
            let source = at.source(name, &[rows, cols])?;
            let (model, expected) = first[part].get_or_insert_with(|| (source.name.clone(), source.dtype));
            if expected.activation_bits() != source.dtype.activation_bits() {
                let reason = format!(
                    "expected {} as {model} is, found {:?}: experts of a layer are multiplied together; quantise the original \
                     model as a whole (keye quantize)",
                    form(*expected),
                    source.dtype
                );
                return Err(BackendError::Weight { name: source.name, reason }.into());
            }
            Ok::<_, ModelError>(at.backend().load(&source)?)
        };
        Ok(Expert {
            gate: load(0, "gate_proj.weight", width, h)?,
            up: load(0, "up_proj.weight", width, h)?,
            down: load(1, "down_proj.weight", h, width)?,
        })
    })
    .collect()
}

/// The types that go with the same form of activations.
fn form(dtype: Dtype) -> &'static str {
    match dtype {
        Dtype::F32 | Dtype::Bf16 | Dtype::F16 | Dtype::F8E4M3 => "floats",
        Dtype::Int8 | Dtype::Int4 => "Int8 or Int4",
        Dtype::Int12 | Dtype::Int10 => "Int12 or Int10",
    }
}

/// `gate_proj`, `up_proj` `[width, H]` and `down_proj` `[H, width]`: this rank's part of the width; of down the columns are
/// copied.
fn dense<B: Backend>(at: &Weights<'_, B>, width: usize, h: usize) -> Result<Expert<B::Weight>, ModelError> {
    let (gate, up) = (at.source("gate_proj.weight", &[width, h])?, at.source("up_proj.weight", &[width, h])?);
    let down = at.source("down_proj.weight", &[h, width])?;
    let part = at.shard().common(width, &[&gate, &up], &[&down])?;
    let backend = at.backend();
    Ok(Expert {
        gate: backend.load(&gate.slice_rows(part.clone())?)?,
        up: backend.load(&up.slice_rows(part.clone())?)?,
        down: backend.load(&down.copy_columns(part)?)?,
    })
}

/// The experts `own` of a layer whose experts are all in two tensors: input-major `[E, H, 2F]` and `[E, F, H]`, or
/// output-major `[E, 2F, H]` and `[E, H, F]`; gates before ups. Where both readings fit, input-major it is. Both are used in place.
fn fused<B: Backend>(
    stored: &Weights<'_, B>,
    config: &ExpertsConfig,
    h: usize,
    own: Range<usize>,
) -> Result<Vec<Expert<B::Weight>>, ModelError> {
    let (e, f) = (config.num_experts, config.moe_intermediate_size);
    let input_major = stored.shape("gate_up_proj").as_deref() == Some(&[e, h, 2 * f]);
    let (gate_up_shape, down_shape) = if input_major { ([e, h, 2 * f], [e, f, h]) } else { ([e, 2 * f, h], [e, h, f]) };
    let gate_up = stored.source("gate_up_proj", &gate_up_shape)?;
    let down = stored.source("down_proj", &down_shape)?;
    let backend = stored.backend();
    own.map(|e| {
        Ok(match input_major {
            true => {
                let gate_up = rows(&gate_up, e * h, h, 2 * f)?;
                Expert {
                    gate: backend.load_columns(&gate_up, 0..f)?,
                    up: backend.load_columns(&gate_up, f..2 * f)?,
                    down: backend.load_columns(&rows(&down, e * f, f, h)?, 0..h)?,
                }
            }
            false => Expert {
                gate: backend.load(&rows(&gate_up, e * 2 * f, f, h)?)?,
                up: backend.load(&rows(&gate_up, e * 2 * f + f, f, h)?)?,
                down: backend.load(&rows(&down, e * h, h, f)?)?,
            },
        })
    })
    .collect()
}

fn element_bytes(source: &WeightSource) -> Result<usize, ModelError> {
    match source.dtype {
        Dtype::F32 => Ok(4),
        Dtype::Bf16 | Dtype::F16 => Ok(2),
        _ => Err(BackendError::Weight {
            name: source.name.clone(),
            reason: "packed experts have to be stored one by one".into(),
        }
        .into()),
    }
}

/// Rows `first..first + count`, `cols` wide, of a tensor, in place.
fn rows(source: &WeightSource, first: usize, count: usize, cols: usize) -> Result<WeightSource, ModelError> {
    let row = cols * element_bytes(source)?;
    let bytes = source.bytes.slice(first * row..(first + count) * row);
    Ok(WeightSource { name: source.name.clone(), dtype: source.dtype, rows: count, cols, bytes, scales: None })
}
