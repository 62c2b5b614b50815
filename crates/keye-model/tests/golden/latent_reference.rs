//! Keye-VL-671B's decoder by the formulas of `docs/spec/keye-vl-671b.md` §4: f64, one loop a formula, all keys and values
//! made anew for every token and not absorbed. Shares no code with the model.

use std::collections::BTreeMap;

/// Tensors by name, row-major.
pub type Tensors = BTreeMap<String, (Vec<usize>, Vec<f64>)>;

pub const HIDDEN: usize = 48;
pub const LAYERS: usize = 3;
pub const HEADS: usize = 3;
pub const Q_RANK: usize = 20;
pub const RANK: usize = 24;
pub const NOPE: usize = 10;
pub const ROPE: usize = 8;
pub const V: usize = 7;
pub const DENSE: usize = 40;
pub const FIRST_MOE: usize = 1;
pub const EXPERT: usize = 18;
pub const EXPERTS: usize = 12;
pub const TOP: usize = 3;
pub const GROUPS: usize = 4;
pub const TOP_GROUPS: usize = 2;
pub const SCALING: f64 = 2.5;
pub const VOCAB: usize = 72;
pub const EPS: f64 = 1e-6;
pub const THETA: f64 = 1e4;
pub const FACTOR: f64 = 40.0;
pub const ORIGINAL: f64 = 64.0;
pub const BETA_FAST: f64 = 8.0;
pub const BETA_SLOW: f64 = 1.0;
pub const MSCALE: f64 = 1.0;
pub const MSCALE_ALL: f64 = 0.7;

/// What the decoder makes of a prompt.
pub struct Expected {
    /// `[n][VOCAB]`
    pub logits: Vec<Vec<f64>>,
    /// Per layer with experts and token: experts, the first choice first, with their weights.
    pub routed: BTreeMap<usize, Vec<Vec<(usize, f64)>>>,
}

pub fn forward(tensors: &Tensors, tokens: &[u32]) -> Expected {
    let vector = |name: &str| tensors[name].1.as_slice();
    let table = vector("model.embed_tokens.weight");
    let mut rows: Vec<Vec<f64>> =
        tokens.iter().map(|t| table[*t as usize * HIDDEN..(*t as usize + 1) * HIDDEN].to_vec()).collect();
    let mut routed = BTreeMap::new();
    for layer in 0..LAYERS {
        let at = format!("model.layers.{layer}");
        let normed: Vec<Vec<f64>> =
            rows.iter().map(|x| norm(x, vector(&format!("{at}.input_layernorm.weight")))).collect();
        let attended = attention(tensors, &format!("{at}.self_attn"), &normed);
        for (x, out) in rows.iter_mut().zip(attended) {
            add(x, &out);
            let y = norm(x, vector(&format!("{at}.post_attention_layernorm.weight")));
            if layer < FIRST_MOE {
                add(x, &gated(tensors, &format!("{at}.mlp"), &y));
                continue;
            }
            let chosen = route(tensors, &format!("{at}.mlp.gate"), &y);
            for (expert, weight) in &chosen {
                let out = gated(tensors, &format!("{at}.mlp.experts.{expert}"), &y);
                add(x, &out.iter().map(|v| v * weight).collect::<Vec<_>>());
            }
            add(x, &gated(tensors, &format!("{at}.mlp.shared_experts"), &y));
            routed.entry(layer).or_insert_with(Vec::new).push(chosen);
        }
    }
    let logits = rows.iter().map(|x| times(tensors, "lm_head.weight", &norm(x, vector("model.norm.weight")))).collect();
    Expected { logits, routed }
}

/// For each row the attention of all heads over the rows up to it.
fn attention(tensors: &Tensors, at: &str, rows: &[Vec<f64>]) -> Vec<Vec<f64>> {
    let name = |part: &str| format!("{at}.{part}.weight");
    let m = |weight: f64| 0.1 * weight * FACTOR.ln() + 1.0;
    let scale = ((NOPE + ROPE) as f64).powf(-0.5) * m(MSCALE_ALL).powi(2);
    // Per row: per head the key and the value.
    let mut cached: Vec<Vec<(Vec<f64>, Vec<f64>)>> = Vec::new();
    let mut out = Vec::new();
    for (position, x) in rows.iter().enumerate() {
        let q = times(tensors, &name("q_a_proj"), x);
        let q = times(tensors, &name("q_b_proj"), &norm(&q, &tensors[&name("q_a_layernorm")].1));
        let kv = times(tensors, &name("kv_a_proj_with_mqa"), x);
        let latent = norm(&kv[..RANK], &tensors[&name("kv_a_layernorm")].1);
        let k_rope = rotated(&kv[RANK..], position);
        let kv = times(tensors, &name("kv_b_proj"), &latent);
        let head = |kv: &[f64]| ([&kv[..NOPE], &k_rope[..]].concat(), kv[NOPE..].to_vec());
        cached.push(kv.chunks(NOPE + V).map(head).collect());
        let mut heads = Vec::new();
        for (h, q) in q.chunks(NOPE + ROPE).enumerate() {
            let q = [&q[..NOPE], &rotated(&q[NOPE..], position)[..]].concat();
            let scores: Vec<f64> = cached.iter().map(|heads| scale * dot(&q, &heads[h].0)).collect();
            let max = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            let sum: f64 = scores.iter().map(|s| (s - max).exp()).sum();
            for d in 0..V {
                heads.push(cached.iter().zip(&scores).map(|(kv, s)| (s - max).exp() / sum * kv[h].1[d]).sum());
            }
        }
        out.push(times(tensors, &name("o_proj"), &heads));
    }
    out
}

/// Pairs of neighbours turned by YaRN's angles.
fn rotated(x: &[f64], position: usize) -> Vec<f64> {
    let place = |beta: f64| ROPE as f64 * (ORIGINAL / (beta * 2.0 * std::f64::consts::PI)).ln() / (2.0 * THETA.ln());
    let low = place(BETA_FAST).floor().max(0.0);
    let high = place(BETA_SLOW).ceil().min((ROPE - 1) as f64);
    let length = (0.1 * MSCALE * FACTOR.ln() + 1.0) / (0.1 * MSCALE_ALL * FACTOR.ln() + 1.0);
    let mut out = x.to_vec();
    for i in 0..ROPE / 2 {
        let f = THETA.powf(-2.0 * i as f64 / ROPE as f64);
        let r = ((i as f64 - low) / (high - low)).clamp(0.0, 1.0);
        let angle = position as f64 * (f / FACTOR * r + f * (1.0 - r));
        let (sin, cos) = (angle.sin() * length, angle.cos() * length);
        out[2 * i] = x[2 * i] * cos - x[2 * i + 1] * sin;
        out[2 * i + 1] = x[2 * i + 1] * cos + x[2 * i] * sin;
    }
    out
}

fn route(tensors: &Tensors, gate: &str, y: &[f64]) -> Vec<(usize, f64)> {
    let scores: Vec<f64> =
        times(tensors, &format!("{gate}.weight"), y).iter().map(|z| 1.0 / (1.0 + (-z).exp())).collect();
    let bias = &tensors[&format!("{gate}.e_score_correction_bias")].1;
    let choice = |e: usize| scores[e] + bias[e];
    let size = EXPERTS / GROUPS;
    let group_score = |g: usize| {
        let mut members: Vec<f64> = (g * size..(g + 1) * size).map(choice).collect();
        members.sort_by(|a, b| b.total_cmp(a));
        members[0] + members[1]
    };
    let mut groups: Vec<usize> = (0..GROUPS).collect();
    groups.sort_by(|a, b| group_score(*b).total_cmp(&group_score(*a)));
    let mut chosen: Vec<usize> = (0..EXPERTS).filter(|e| groups[..TOP_GROUPS].contains(&(e / size))).collect();
    chosen.sort_by(|a, b| choice(*b).total_cmp(&choice(*a)));
    chosen.truncate(TOP);
    let sum: f64 = chosen.iter().map(|e| scores[*e]).sum::<f64>() + 1e-20;
    chosen.into_iter().map(|e| (e, scores[e] / sum * SCALING)).collect()
}

/// `down(silu(gate y) * (up y))`
fn gated(tensors: &Tensors, at: &str, y: &[f64]) -> Vec<f64> {
    let gate = times(tensors, &format!("{at}.gate_proj.weight"), y);
    let up = times(tensors, &format!("{at}.up_proj.weight"), y);
    let h: Vec<f64> = gate.iter().zip(up).map(|(g, u)| g / (1.0 + (-g).exp()) * u).collect();
    times(tensors, &format!("{at}.down_proj.weight"), &h)
}

fn norm(x: &[f64], gamma: &[f64]) -> Vec<f64> {
    let mean = x.iter().map(|v| v * v).sum::<f64>() / x.len() as f64;
    x.iter().zip(gamma).map(|(v, g)| v / (mean + EPS).sqrt() * g).collect()
}

/// The matrix `[out, in]` times x.
fn times(tensors: &Tensors, name: &str, x: &[f64]) -> Vec<f64> {
    tensors[name].1.chunks(x.len()).map(|row| dot(row, x)).collect()
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

fn add(x: &mut [f64], y: &[f64]) {
    x.iter_mut().zip(y).for_each(|(x, y)| *x += y);
}
