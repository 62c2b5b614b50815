//! The CPU backend: all cores, vector instructions chosen at run time, weights in place.

mod attention;
mod cache;
mod columns;
mod experts;
mod gemm;
pub(crate) mod isa;
mod latent;
pub mod matmul;
mod matmul_bf16;
mod pool;
mod quantized;
#[cfg(target_arch = "x86_64")]
mod quantized_avx2;
#[cfg(target_arch = "x86_64")]
mod quantized_avx512;
#[cfg(target_arch = "x86_64")]
mod quantized_vnni256;
mod rows;
#[cfg(target_arch = "x86_64")]
mod rows_avx512;
mod sparse;
mod wide;
#[cfg(target_arch = "x86_64")]
mod wide_x86;

use std::ops::Range;

use crate::host::{HostTensor, HostWeight};
use crate::{
    Activation, AttentionShape, Backend, BackendError, CacheSpec, Dtype, Expert, GroupedRouting, IndexShape,
    LatentShape, QkNorm, SequenceRows, Span, WeightSource, fp8_rows, grouped_routing, select,
};
use gemm::Finish;
use pool::{Pool, SyncPtr};

pub use cache::CpuCache;
pub use isa::Isa;

/// Threads and instruction set.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct CpuOptions {
    /// Threads; `None` is one per core.
    pub threads: Option<usize>,
    /// Instruction set; `None` is `KEYE_ISA` or the best.
    pub isa: Option<Isa>,
}

/// Vectors on all cores.
pub struct Cpu {
    isa: Isa,
    pool: Pool,
}

impl Cpu {
    /// Starts the threads. Errors: `KEYE_ISA` names a set that is unknown or not here; threads cannot be started.
    pub fn new(options: CpuOptions) -> Result<Self, BackendError> {
        let isa = match options.isa {
            Some(isa) if isa > Isa::detect() => {
                return Err(BackendError::Setting(format!("this machine has no {}", isa.name())));
            }
            Some(isa) => isa,
            None => Isa::from_env()?,
        };
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        let threads = options.threads.unwrap_or(cores).clamp(1, 1024);
        let pool = Pool::new(threads)
            .map_err(|error| BackendError::Setting(format!("cannot start {threads} threads: {error}")))?;
        Ok(Self { isa, pool })
    }

    /// Runs `row(i, out row i)` for all rows of `out`.
    fn each_row(&self, out: &mut HostTensor, work_per_row: usize, row: impl Fn(usize, &mut [f32]) + Sync) {
        const ROWS: usize = 16;
        let (rows, cols) = (out.rows, out.cols);
        let target = SyncPtr(out.data.as_mut_ptr());
        self.pool.run(rows.div_ceil(ROWS), rows * work_per_row, |task, _| {
            for i in task * ROWS..rows.min((task + 1) * ROWS) {
                // SAFETY: each row belongs to one task.
                row(i, unsafe { std::slice::from_raw_parts_mut(target.get().add(i * cols), cols) });
            }
        });
    }
}

impl Backend for Cpu {
    type Tensor = HostTensor;
    type Weight = HostWeight;
    type Index = Vec<u32>;
    type Cache = CpuCache;
    type Plan = Vec<SequenceRows>;

    fn describe(&self) -> String {
        format!("cpu ({}, {} threads)", self.isa.name(), self.pool.threads())
    }

    fn load(&self, source: &WeightSource) -> Result<HostWeight, BackendError> {
        HostWeight::load(source)
    }

    fn load_columns(&self, source: &WeightSource, columns: Range<usize>) -> Result<HostWeight, BackendError> {
        HostWeight::load_columns(source, columns)
    }

    fn zeros(&self, rows: usize, cols: usize) -> Result<HostTensor, BackendError> {
        Ok(HostTensor::zeros(rows, cols))
    }

    fn upload(&self, rows: usize, cols: usize, values: &[f32]) -> Result<HostTensor, BackendError> {
        Ok(HostTensor::from_f32(rows, cols, values))
    }

    fn upload_u8(&self, rows: usize, cols: usize, values: &[u8]) -> Result<HostTensor, BackendError> {
        Ok(HostTensor::from_u8(rows, cols, values))
    }

    fn upload_index(&self, values: &[u32]) -> Result<Vec<u32>, BackendError> {
        Ok(values.to_vec())
    }

    fn download(&self, x: &HostTensor) -> Result<Vec<f32>, BackendError> {
        Ok(x.data.clone())
    }

    fn rows(&self, x: &HostTensor) -> usize {
        x.rows
    }

    fn cols(&self, x: &HostTensor) -> usize {
        x.cols
    }

    fn reshape(&self, x: HostTensor, rows: usize, cols: usize) -> Result<HostTensor, BackendError> {
        Ok(x.reshape(rows, cols))
    }

    fn slice_rows(&self, x: &HostTensor, rows: Range<usize>) -> Result<HostTensor, BackendError> {
        Ok(x.slice_rows(rows))
    }

    fn copy_rows(
        &self,
        x: &HostTensor,
        from: Range<usize>,
        to: &mut HostTensor,
        at: usize,
    ) -> Result<(), BackendError> {
        x.copy_rows(from, to, at);
        Ok(())
    }

    fn gather_rows(&self, x: &HostTensor, index: &Vec<u32>, group: usize) -> Result<HostTensor, BackendError> {
        Ok(x.gather_rows(index, group))
    }

    fn embed(&self, table: &HostWeight, ids: &Vec<u32>) -> Result<HostTensor, BackendError> {
        let mut out = HostTensor::stale(ids.len(), table.cols);
        for (i, id) in ids.iter().enumerate() {
            table.widen_row(*id as usize, out.row_mut(i));
        }
        Ok(out)
    }

    fn add_weighted_rows(
        &self,
        x: &mut HostTensor,
        table: &HostWeight,
        index: &Vec<u32>,
        weights: &HostTensor,
    ) -> Result<(), BackendError> {
        let taps = weights.cols;
        let cols = x.cols;
        assert_eq!(index.len(), x.rows * taps);
        self.each_row(x, taps * cols, |i, row| {
            let mut sum = vec![0.0f32; cols];
            let mut tap = vec![0.0f32; cols];
            for t in 0..taps {
                let weight = weights.row(i)[t];
                table.widen_row(index[i * taps + t] as usize, &mut tap);
                for (sum, tap) in sum.iter_mut().zip(&tap) {
                    *sum += weight * tap;
                }
            }
            for (value, sum) in row.iter_mut().zip(&sum) {
                *value += sum;
            }
        });
        Ok(())
    }

    fn layer_norm(
        &self,
        x: &HostTensor,
        gamma: &HostWeight,
        beta: &HostWeight,
        eps: f32,
    ) -> Result<HostTensor, BackendError> {
        let mut out = HostTensor::stale(x.rows, x.cols);
        let (gamma, beta) = (gamma.vector(), beta.vector());
        self.each_row(&mut out, 4 * x.cols, |i, row| rows::layer_norm(self.isa, x.row(i), gamma, beta, eps, row));
        Ok(out)
    }

    fn rms_norm(&self, x: &HostTensor, gamma: &HostWeight, eps: f32) -> Result<HostTensor, BackendError> {
        let mut out = HostTensor::stale(x.rows, x.cols);
        let gamma = gamma.vector();
        self.each_row(&mut out, 4 * x.cols, |i, row| {
            row.copy_from_slice(x.row(i));
            rows::rms_norm(self.isa, row, gamma, eps);
        });
        Ok(out)
    }

    fn linear(
        &self,
        x: &HostTensor,
        weight: &HostWeight,
        bias: Option<&HostWeight>,
        activation: Activation,
    ) -> Result<HostTensor, BackendError> {
        let mut out = HostTensor::stale(x.rows, weight.rows);
        gemm::product(&self.pool, self.isa, x, weight, bias, &Finish::Store(activation), &mut out);
        Ok(out)
    }

    fn linear_add(
        &self,
        x: &HostTensor,
        weight: &HostWeight,
        bias: Option<&HostWeight>,
        y: &mut HostTensor,
    ) -> Result<(), BackendError> {
        gemm::product(&self.pool, self.isa, x, weight, bias, &Finish::Add, y);
        Ok(())
    }

    fn gated(&self, x: &HostTensor, gate: &HostWeight, up: &HostWeight) -> Result<HostTensor, BackendError> {
        assert_eq!((gate.rows, gate.cols), (up.rows, up.cols), "gate and up");
        let mut out = HostTensor::stale(x.rows, gate.rows);
        let activations = |weight: &HostWeight| weight.packed().and_then(Dtype::activation_bits);
        if activations(gate) != activations(up) {
            let up = self.linear(x, up, None, Activation::None)?;
            gemm::product(&self.pool, self.isa, x, gate, None, &Finish::Store(Activation::None), &mut out);
            self.each_row(&mut out, 16 * gate.rows, |i, row| rows::silu_mul(self.isa, row, up.row(i)));
            return Ok(out);
        }
        gemm::product(&self.pool, self.isa, x, gate, None, &Finish::Gate(up), &mut out);
        Ok(out)
    }

    fn rope(&self, x: &mut HostTensor, heads: usize, angles: &HostTensor) -> Result<(), BackendError> {
        let head_dim = x.cols / heads;
        assert_eq!((angles.rows, angles.cols), (x.rows, head_dim), "angles");
        self.each_row(x, 4 * heads * head_dim, |i, row| {
            let (cos, sin) = angles.row(i).split_at(head_dim / 2);
            for head in row.chunks_exact_mut(head_dim) {
                rows::rope(self.isa, head, cos, sin);
            }
        });
        Ok(())
    }

    fn rope_pairs(&self, x: &mut HostTensor, heads: usize, angles: &HostTensor) -> Result<(), BackendError> {
        let (head_dim, width) = (x.cols / heads, angles.cols);
        assert!(angles.rows == x.rows && width <= head_dim, "angles");
        self.each_row(x, 4 * heads * width, |i, row| {
            for head in row.chunks_exact_mut(head_dim) {
                rows::rope_pairs(&mut head[head_dim - width..], angles.row(i));
            }
        });
        Ok(())
    }

    fn linear_heads(&self, x: &HostTensor, weights: &[HostWeight]) -> Result<HostTensor, BackendError> {
        Ok(gemm::heads(&self.pool, self.isa, x, weights))
    }

    fn attention(
        &self,
        q: &HostTensor,
        k: &HostTensor,
        v: &HostTensor,
        shape: AttentionShape,
        spans: &[Span],
    ) -> Result<HostTensor, BackendError> {
        Ok(attention::spans(&self.pool, self.isa, q, k, v, shape, spans))
    }

    fn cache(&self, spec: &CacheSpec, blocks: usize) -> Result<CpuCache, BackendError> {
        CpuCache::new(*spec, blocks)
    }

    fn plan(&self, sequences: &[SequenceRows]) -> Result<Vec<SequenceRows>, BackendError> {
        Ok(sequences.to_vec())
    }

    fn norm_rope_write(
        &self,
        q: &mut HostTensor,
        mut k: HostTensor,
        v: HostTensor,
        norm: Option<QkNorm<'_, HostWeight>>,
        angles: &HostTensor,
        cache: &mut CpuCache,
        layer: usize,
        plan: &Vec<SequenceRows>,
    ) -> Result<(), BackendError> {
        let head_dim = angles.cols;
        let norm_rope = |x: &mut HostTensor, gamma: Option<(&[f32], f32)>| {
            self.each_row(x, 8 * head_dim, |i, row| {
                let (cos, sin) = angles.row(i).split_at(head_dim / 2);
                for head in row.chunks_exact_mut(head_dim) {
                    if let Some((gamma, eps)) = gamma {
                        rows::rms_norm(self.isa, head, gamma, eps);
                    }
                    rows::rope(self.isa, head, cos, sin);
                }
            });
        };
        norm_rope(q, norm.as_ref().map(|n| (n.q.vector(), n.eps)));
        norm_rope(&mut k, norm.as_ref().map(|n| (n.k.vector(), n.eps)));
        cache.write(layer, plan, &k, &v);
        Ok(())
    }

    fn paged_attention(
        &self,
        q: &HostTensor,
        cache: &CpuCache,
        layer: usize,
        plan: &Vec<SequenceRows>,
        shape: AttentionShape,
    ) -> Result<HostTensor, BackendError> {
        Ok(attention::paged(&self.pool, self.isa, q, cache, layer, plan, shape))
    }

    fn download_index(&self, index: &Vec<u32>) -> Result<Vec<u32>, BackendError> {
        Ok(index.clone())
    }

    fn route(
        &self,
        x: &HostTensor,
        router: &HostWeight,
        count: usize,
        normalise: bool,
    ) -> Result<(Vec<u32>, HostTensor), BackendError> {
        let logits = self.linear(x, router, None, Activation::None)?;
        Ok(select::route_rows(&logits, count, normalise))
    }

    fn route_grouped(
        &self,
        x: &HostTensor,
        router: &HostWeight,
        bias: &HostWeight,
        routing: GroupedRouting,
    ) -> Result<(Vec<u32>, HostTensor), BackendError> {
        let logits = self.linear(x, router, None, Activation::None)?;
        Ok(grouped_routing::route_rows(&logits, bias.vector(), &routing))
    }

    fn add_experts(
        &self,
        x: &HostTensor,
        experts: &[Expert<HostWeight>],
        chosen: &Vec<u32>,
        weights: &HostTensor,
        y: &mut HostTensor,
    ) -> Result<(), BackendError> {
        experts::add(self, x, experts, chosen, weights, y);
        Ok(())
    }

    fn round_to_fp8(&self, x: &mut HostTensor, width: usize) -> Result<(), BackendError> {
        self.each_row(x, 16 * x.cols, |_, row| row.chunks_exact_mut(width).for_each(fp8_rows::round));
        Ok(())
    }

    fn write_index_keys(
        &self,
        keys: &HostTensor,
        cache: &mut CpuCache,
        layer: usize,
        plan: &Vec<SequenceRows>,
    ) -> Result<(), BackendError> {
        cache.write_index(layer, plan, keys);
        Ok(())
    }

    fn select(
        &self,
        q: &HostTensor,
        weights: &HostTensor,
        cache: &CpuCache,
        layer: usize,
        plan: &Vec<SequenceRows>,
        shape: IndexShape,
    ) -> Result<Vec<u32>, BackendError> {
        Ok(sparse::select(&self.pool, self.isa, q, weights, cache, layer, plan, shape))
    }

    fn sparse_attention(
        &self,
        q: &HostTensor,
        cache: &CpuCache,
        layer: usize,
        plan: &Vec<SequenceRows>,
        shape: AttentionShape,
        selected: &Vec<u32>,
    ) -> Result<HostTensor, BackendError> {
        Ok(sparse::attend(&self.pool, self.isa, q, cache, layer, plan, shape, selected))
    }

    fn write_latent(
        &self,
        a: &HostTensor,
        b: &HostTensor,
        cache: &mut CpuCache,
        layer: usize,
        plan: &Vec<SequenceRows>,
    ) -> Result<(), BackendError> {
        cache.write_latent(layer, plan, a, b);
        Ok(())
    }

    fn latent_attention(
        &self,
        q: &HostTensor,
        cache: &CpuCache,
        layer: usize,
        plan: &Vec<SequenceRows>,
        shape: LatentShape,
    ) -> Result<HostTensor, BackendError> {
        Ok(latent::attend(&self.pool, self.isa, q, cache, layer, plan, shape))
    }
}
