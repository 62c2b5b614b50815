//! The language model (spec §6): Qwen3 with three-axis RoPE over a paged KV cache; 2.0 may put experts in the place of the
//! feed-forward block and let an indexer choose the keys; 671B has experts and latent attention.

use std::ops::Range;

use keye_backend::{Activation, AttentionShape, Backend, BackendError, QkNorm};
use keye_processor::TextConfig;

use crate::feed_forward::FeedForward;
use crate::indexer::Indexer;
use crate::latent_attention::LatentAttention;
use crate::ranks::{Peers, Shard};
use crate::rope::Rope;
use crate::step::{Place, Rows};
use crate::tap::record;
use crate::weights::{Linear, Weights};
use crate::{ModelError, Tap};

/// This rank's part of the decoder.
pub(crate) struct Decoder<B: Backend> {
    pub(crate) config: TextConfig,
    peers: Peers<B>,
    rope: Rope,
    /// The indexer's, of its own width.
    index_rope: Option<Rope>,
    /// `[V, H]`, on rank 0.
    embed_tokens: Option<B::Weight>,
    layers: Vec<DecoderLayer<B>>,
    /// `[H]`
    norm: B::Weight,
    /// This rank's rows of `[V, H]`; `None` when it is all of `embed_tokens`.
    lm_head: Option<B::Weight>,
}

struct DecoderLayer<B: Backend> {
    /// `[H]`
    input_layernorm: B::Weight,
    attention: Attention<B>,
    o_proj: Linear<B>,
    /// `[H]`
    post_attention_layernorm: B::Weight,
    feed_forward: FeedForward<B>,
}

enum Attention<B: Backend> {
    Heads(Box<HeadsAttention<B>>),
    Latent(Box<LatentAttention<B>>),
}

/// Keys and values per head.
struct HeadsAttention<B: Backend> {
    shape: AttentionShape,
    q_proj: Linear<B>,
    k_proj: Linear<B>,
    v_proj: Linear<B>,
    /// `[head_dim]`
    q_norm: B::Weight,
    /// `[head_dim]`
    k_norm: B::Weight,
    indexer: Option<Indexer<B>>,
}

impl<B: Backend> Decoder<B> {
    /// The part of `peers`' rank; `weights` are its too.
    pub(crate) fn load(weights: &Weights<'_, B>, config: &TextConfig, peers: Peers<B>) -> Result<Self, ModelError> {
        let (h, shard) = (config.hidden_size, weights.shard());
        let heads = shard.heads(config);
        let value_dim = config.latent.map_or(config.head_dim, |latent| latent.v_head_dim);
        let model = weights.at("model");
        let layers = (0..config.num_hidden_layers)
            .map(|number| {
                let layer = model.at(format_args!("layers.{number}"));
                let attention = layer.at("self_attn");
                let o = config.num_attention_heads * value_dim;
                Ok(DecoderLayer {
                    input_layernorm: layer.vector("input_layernorm.weight", h)?,
                    o_proj: {
                        let part = heads.start * value_dim..heads.end * value_dim;
                        attention.linear_inputs("o_proj", h, o, config.attention_bias, part)?
                    },
                    post_attention_layernorm: layer.vector("post_attention_layernorm.weight", h)?,
                    attention: match &config.latent {
                        Some(latent) => Attention::Latent(Box::new(LatentAttention::load(&attention, config, latent)?)),
                        None => Attention::Heads(Box::new(HeadsAttention::load(&attention, config)?)),
                    },
                    feed_forward: FeedForward::load(&layer.at("mlp"), config, number)?,
                })
            })
            .collect::<Result<_, ModelError>>()?;
        let tied = config.tie_word_embeddings && !weights.has("lm_head.weight");
        let embed_tokens = model.source("embed_tokens.weight", &[config.vocab_size, h])?;
        let lm_head = match tied {
            true => embed_tokens.clone(),
            false => weights.source("lm_head.weight", &[config.vocab_size, h])?,
        };
        let vocabulary = shard.common(config.vocab_size, &[&lm_head], &[])?;
        let backend = weights.backend();
        Ok(Self {
            rope: match &config.latent {
                Some(latent) => Rope::yarn(config.rope_theta, latent.qk_rope_head_dim, &latent.yarn),
                None => Rope::decoder(config.rope_theta, config.head_dim, config.mrope_section),
            },
            index_rope: config.indexer.map(|i| Rope::decoder(config.rope_theta, i.head_dim, i.mrope_section)),
            embed_tokens: if shard.rank == 0 { Some(backend.load(&embed_tokens)?) } else { None },
            layers,
            norm: model.vector("norm.weight", h)?,
            lm_head: match tied && shard == Shard::WHOLE {
                true => None,
                false => Some(backend.load(&lm_head.slice_rows(vocabulary)?)?),
            },
            config: config.clone(),
            peers,
        })
    }

    /// Rows of tokens `[n, H]`, on rank 0.
    pub(crate) fn embed(&self, backend: &B, tokens: &[u32]) -> Result<B::Tensor, BackendError> {
        let table = self.embed_tokens.as_ref().expect("rank 0 embeds");
        backend.embed(table, &backend.upload_index(tokens)?)
    }

    /// All layers over the rows of a step, `[n, H]`, before the final norm. `x` is rank 0's, the others bring nothing.
    pub(crate) fn forward(
        &self,
        backend: &B,
        x: Option<B::Tensor>,
        Rows { positions, sequences, .. }: &Rows,
        cache: &mut B::Cache,
        tap: &mut dyn Tap,
    ) -> Result<B::Tensor, BackendError> {
        let (config, peers) = (&self.config, &self.peers);
        let mut x = peers.share(backend, x)?;
        let plan = backend.plan(sequences)?;
        let table = |rope: &Rope, width: usize| {
            let mut table = Vec::with_capacity(positions.len() * width);
            positions.iter().for_each(|position| rope.push(position, &mut table));
            backend.upload(positions.len(), width, &table)
        };
        let angles = table(&self.rope, config.latent.map_or(config.head_dim, |latent| latent.qk_rope_head_dim))?;
        let index_angles = match (&self.index_rope, config.indexer) {
            (Some(rope), Some(indexer)) => Some(table(rope, indexer.head_dim)?),
            _ => None,
        };
        let longest = sequences.iter().map(|s| s.start + s.rows.len()).max().unwrap_or(0);
        record(backend, tap, format_args!("hidden_states.0"), &x)?;
        for (number, layer) in self.layers.iter().enumerate() {
            let h = backend.rms_norm(&x, &layer.input_layernorm, config.rms_norm_eps)?;
            let place = Place { cache, layer: number, plan: &plan };
            let attended = match &layer.attention {
                Attention::Heads(heads) => {
                    let angles = Angles { heads: &angles, indexer: index_angles.as_ref() };
                    heads.attend(backend, config, &h, angles, longest, place, tap)?
                }
                Attention::Latent(latent) => latent.attend(backend, &h, &angles, place)?,
            };
            let add = |x: &mut B::Tensor| layer.o_proj.add(backend, &attended, x);
            if tap.wants(&format!("attn_out.{number}")) {
                let mut out = backend.zeros(backend.rows(&x), backend.cols(&x))?;
                peers.add(backend, &mut out, add)?;
                record(backend, tap, format_args!("attn_out.{number}"), &out)?;
            }
            peers.add(backend, &mut x, add)?;
            let h = backend.rms_norm(&x, &layer.post_attention_layernorm, config.rms_norm_eps)?;
            layer.feed_forward.add(backend, peers, &h, &mut x, number, tap)?;
            record(backend, tap, format_args!("hidden_states.{}", number + 1), &x)?;
            if number == 0 {
                record(backend, tap, format_args!("lm_layer0"), &x)?;
            }
        }
        Ok(x)
    }

    /// The final norm: `[n, H]` to `[n, H]`.
    pub(crate) fn final_norm(&self, backend: &B, x: &B::Tensor) -> Result<B::Tensor, BackendError> {
        backend.rms_norm(x, &self.norm, self.config.rms_norm_eps)
    }

    /// Logits `[n, V]` of the wanted rows of what [`Decoder::forward`] gave, on rank 0; at least one is wanted.
    pub(crate) fn logits(&self, backend: &B, x: &B::Tensor, rows: &Rows) -> Result<Option<B::Tensor>, BackendError> {
        let rows = backend.gather_rows(x, &backend.upload_index(&rows.wanted)?, 1)?;
        let rows = self.final_norm(backend, &rows)?;
        let lm_head = self.lm_head.as_ref().or(self.embed_tokens.as_ref()).expect("a tied table is rank 0's");
        self.peers.gather(backend, backend.linear(&rows, lm_head, None, Activation::None)?)
    }
}

/// Tables of angles, `[n, head_dim]` and the indexer's own.
struct Angles<'a, B: Backend> {
    heads: &'a B::Tensor,
    indexer: Option<&'a B::Tensor>,
}

impl<B: Backend> HeadsAttention<B> {
    fn load(attention: &Weights<'_, B>, config: &TextConfig) -> Result<Self, ModelError> {
        let (h, shard, width) = (config.hidden_size, attention.shard(), config.head_dim);
        let (heads, kv_heads) = (shard.heads(config), shard.kv_heads(config));
        let outputs = |name: &str, all: usize, own: &Range<usize>| {
            let part = own.start * width..own.end * width;
            attention.linear_outputs(name, all * width, h, config.attention_bias, part)
        };
        Ok(Self {
            shape: AttentionShape {
                heads: heads.len(),
                kv_heads: kv_heads.len(),
                head_dim: width,
                scale: (width as f32).powf(-0.5),
            },
            q_proj: outputs("q_proj", config.num_attention_heads, &heads)?,
            k_proj: outputs("k_proj", config.num_key_value_heads, &kv_heads)?,
            v_proj: outputs("v_proj", config.num_key_value_heads, &kv_heads)?,
            q_norm: attention.vector("q_norm.weight", config.head_dim)?,
            k_norm: attention.vector("k_norm.weight", config.head_dim)?,
            indexer: Indexer::load(attention, config)?,
        })
    }

    /// Attention of the normed rows `x [n, H]` before the output projection, `[n, heads * head_dim]`; the longest sequence
    /// of the step has `longest` tokens.
    #[allow(clippy::too_many_arguments, reason = "operands of one layer")]
    fn attend(
        &self,
        backend: &B,
        config: &TextConfig,
        x: &B::Tensor,
        angles: Angles<'_, B>,
        longest: usize,
        place: Place<'_, B>,
        tap: &mut dyn Tap,
    ) -> Result<B::Tensor, BackendError> {
        let shape = self.shape;
        let mut q = self.q_proj.forward(backend, x, Activation::None)?;
        let k = self.k_proj.forward(backend, x, Activation::None)?;
        let v = self.v_proj.forward(backend, x, Activation::None)?;
        let norm = QkNorm { q: &self.q_norm, k: &self.k_norm, eps: config.rms_norm_eps };
        let Place { cache, layer, plan } = place;
        backend.norm_rope_write(&mut q, k, v, Some(norm), angles.heads, cache, layer, plan)?;
        match (&self.indexer, angles.indexer) {
            (Some(indexer), Some(angles)) => {
                let place = Place { cache, layer, plan };
                indexer.attend(backend, x, angles, &q, longest, shape, place, tap)
            }
            _ => backend.paged_attention(&q, cache, layer, plan, shape),
        }
    }
}
