//! NVIDIA GPUs from Ampere on: own kernels, compiled by NVRTC for the chip that is found. Feature `cuda`.
//!
//! Nothing of CUDA is needed to build or to start; [`Cuda::new`] says what is missing. `kernels/` has the device's side,
//! one file an operation group; `docs/cuda.md` what has been run where.
//!
//! Activations are f32. What products read of them (bf16 rows, or rows in eight bits for packed weights) is made once for all
//! products with the same rows. Every result is row-invariant, in both modes of [`Products`].

mod attention;
mod blas;
mod device;
#[cfg(feature = "cuda-emulator")]
mod emulator;
mod gpu;
pub mod kernels;
mod libraries;
pub mod nvrtc;
mod products;
mod tensor;
mod training;

use std::ops::Range;
use std::sync::Arc;

use device::{Arg, Device, Grid, ProductArg};
use products::Epilogue;
use tensor::Form;

pub use attention::{Cache, Plan};
pub use tensor::{Index, Tensor, Weight};

use crate::{
    Activation, AttentionShape, Backend, BackendError, CacheSpec, Expert, IndexShape, QkNorm, SequenceRows, Span,
    WeightSource, fp8_rows,
};

/// How rows are multiplied with weights stored as bf16, and queries with keys. Packed weights are not concerned.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Products {
    /// Activations are rounded to bf16; sums are f32. The matrix cores' way.
    #[default]
    Bf16,
    /// Everything in f32. Slow: to tell the rounding of [`Products::Bf16`] from an error.
    F32,
}

/// Settings.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct CudaOptions {
    /// The GPU's number.
    pub device: usize,
    /// Products.
    pub products: Products,
    /// Large bf16 products are left to cuBLASLt, which has to be there. Faster, but a row's result then depends on the
    /// number of rows.
    pub library: bool,
    /// Every launch is waited for, so that an error names its kernel. Slow: for checks.
    pub waiting: bool,
}

/// Room for the highest elements of a row.
const HIGHEST: usize = 512;

/// One GPU. Clones share it.
#[derive(Clone)]
pub struct Cuda {
    device: Arc<Device>,
    products: Products,
}

impl Cuda {
    /// Opens a GPU and loads the kernels, compiling them where no cache has them.
    ///
    /// # Errors
    /// When driver, GPU or (for the first start) NVRTC is missing; the message says which.
    pub fn new(options: CudaOptions) -> Result<Self, BackendError> {
        let device = Arc::new(Device::Gpu(Box::new(gpu::Gpu::open(options)?)));
        Ok(Self { device, products: options.products })
    }

    /// The kernels compiled for the CPU with g++, very slow: for tests where there is no GPU. `None` without g++, and on
    /// other processors than x86-64.
    #[cfg(feature = "cuda-emulator")]
    pub fn emulated(products: Products) -> Option<Self> {
        static DEVICE: std::sync::OnceLock<Option<Arc<Device>>> = std::sync::OnceLock::new();
        Self::on_emulator(&DEVICE, emulator::Kind::Fast, products)
    }

    /// For tests: a GPU, or else [`Cuda::emulated`]; which of them is printed, and why.
    ///
    /// # Panics
    /// Without a usable GPU where `KEYE_GPU=1` asks for one.
    #[cfg(feature = "cuda-emulator")]
    pub fn for_tests(products: Products) -> Option<Self> {
        let found = match Self::new(CudaOptions { products, ..CudaOptions::default() }) {
            Ok(gpu) => Some(gpu),
            Err(error) if std::env::var_os("KEYE_GPU").is_some_and(|wanted| wanted == "1") => {
                panic!("KEYE_GPU=1 asks for a GPU: {error}");
            }
            Err(error) => {
                eprintln!("no GPU: {error}");
                Self::emulated(products)
            }
        };
        match &found {
            Some(cuda) => eprintln!("{}", cuda.describe()),
            None => eprintln!("skipped: neither a GPU nor a g++ to compile the kernels for the CPU with"),
        }
        found
    }

    /// As [`Cuda::emulated`], slower still: a launch panics when threads race for memory, or load from shared memory what
    /// their block has not stored.
    #[cfg(feature = "cuda-emulator")]
    pub fn watched(products: Products) -> Option<Self> {
        static DEVICE: std::sync::OnceLock<Option<Arc<Device>>> = std::sync::OnceLock::new();
        Self::on_emulator(&DEVICE, emulator::Kind::Watched, products)
    }

    #[cfg(feature = "cuda-emulator")]
    fn on_emulator(
        device: &std::sync::OnceLock<Option<Arc<Device>>>,
        kind: emulator::Kind,
        products: Products,
    ) -> Option<Self> {
        let build = || emulator::Emulator::build(kind).map(|emulator| Arc::new(Device::Emulator(emulator)));
        device.get_or_init(build).clone().map(|device| Self { device, products })
    }

    /// Bytes of the GPU's memory: free, and in all. What was freed here counts as free, so everything launched before is
    /// waited for.
    pub fn memory(&self) -> Result<(u64, u64), BackendError> {
        match &*self.device {
            Device::Gpu(gpu) => gpu.memory(),
            #[cfg(feature = "cuda-emulator")]
            Device::Emulator(_) => Ok((1 << 30, 1 << 30)),
        }
    }

    fn highest_of_rows(&self, x: &Tensor, count: usize) -> Result<Vec<Vec<(u32, f32)>>, BackendError> {
        assert!((1..=128).contains(&count), "half as many as a block has threads: of more the bound is too low");
        let words = 1 + 2 * HIGHEST;
        // Cleared, since the list is fetched whole, its unused end included.
        let found = self.device.zeros("the highest logits", x.rows * words * 4)?;
        let args =
            [x.memory.arg(), found.arg(), Arg::U32(x.cols as u32), Arg::U32(count as u32), Arg::U32(HIGHEST as u32)];
        self.device.launch("find_highest", Grid::of(x.rows, 1, 256), &args)?;
        let found = found.download(x.rows * words * 4)?;
        let (found, _) = found.as_chunks::<4>();
        let row = |row: &[[u8; 4]]| {
            let count = u32::from_le_bytes(row[0]) as usize;
            let pairs = row[1..].chunks_exact(2).take(if count <= HIGHEST { count } else { 0 });
            pairs.map(|pair| (u32::from_le_bytes(pair[0]), f32::from_le_bytes(pair[1]))).collect()
        };
        Ok(found.chunks_exact(words).map(row).collect())
    }

    fn embed_rows(&self, table: &Weight, ids: &Index) -> Result<Tensor, BackendError> {
        let out = Tensor::room(&self.device, ids.len, table.cols)?;
        let (kernel, shape) = match table.form {
            Form::F32 | Form::Wide => ("embed_f32", [table.cols, table.stride]),
            Form::Bf16 => ("embed_bf16", [table.cols, table.stride]),
            Form::Fp8 => {
                let table = ProductArg {
                    weight: table.memory.address(),
                    y: out.memory.address(),
                    n: table.rows as u32,
                    k: table.cols as u32,
                    w_stride: table.stride as u32,
                    w_block: table.block as u32,
                    ..Default::default()
                };
                let args = [Arg::Product(table), ids.memory.arg()];
                self.device.launch("embed_fp8", Grid::of(ids.len, 1, 256), &args)?;
                return Ok(out);
            }
            Form::Int8 => ("embed_int8", [table.rows, table.cols]),
            Form::Int4 => ("embed_int4", [table.rows, table.cols]),
        };
        let [a, b] = shape.map(|n| Arg::U32(n as u32));
        let args = [table.memory.arg(), ids.memory.arg(), out.memory.arg(), a, b];
        self.device.launch(kernel, Grid::of(ids.len, 1, 256), &args)?;
        Ok(out)
    }
}

impl Backend for Cuda {
    type Tensor = Tensor;
    type Weight = Weight;
    type Index = Index;
    type Cache = Cache;
    type Plan = Plan;

    fn describe(&self) -> String {
        let name = match &*self.device {
            Device::Gpu(gpu) => gpu.name(),
            #[cfg(feature = "cuda-emulator")]
            Device::Emulator(_) => "kernels compiled for the CPU",
        };
        let products = match self.products {
            Products::Bf16 => "bf16",
            Products::F32 => "f32",
        };
        format!("cuda ({name}, products in {products})")
    }

    fn load(&self, source: &WeightSource) -> Result<Weight, BackendError> {
        Weight::load(&self.device, source, self.products)
    }

    fn load_columns(&self, source: &WeightSource, columns: Range<usize>) -> Result<Weight, BackendError> {
        Weight::load_columns(&self.device, source, columns, self.products)
    }

    fn zeros(&self, rows: usize, cols: usize) -> Result<Tensor, BackendError> {
        Ok(Tensor::new(self.device.zeros("activations", rows * cols * 4)?, rows, cols))
    }

    fn upload(&self, rows: usize, cols: usize, values: &[f32]) -> Result<Tensor, BackendError> {
        assert_eq!(values.len(), rows * cols, "values");
        let bytes: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
        Ok(Tensor::new(self.device.upload("activations", &bytes)?, rows, cols))
    }

    fn upload_u8(&self, rows: usize, cols: usize, values: &[u8]) -> Result<Tensor, BackendError> {
        assert_eq!(values.len(), rows * cols, "values");
        let bytes = self.device.upload("pixels", values)?;
        let out = Tensor::room(&self.device, rows, cols)?;
        let args = [bytes.arg(), out.memory.arg(), Arg::U64(values.len() as u64)];
        self.device.launch("widen_u8", Grid::of(values.len().div_ceil(256), 1, 256), &args)?;
        Ok(out)
    }

    fn upload_index(&self, values: &[u32]) -> Result<Index, BackendError> {
        Ok(Index { memory: self.device.upload_u32("an index", values)?, len: values.len() })
    }

    fn synchronize(&self) -> Result<(), BackendError> {
        match &*self.device {
            Device::Gpu(gpu) => gpu.synchronize(),
            // A launch returns when it is done.
            #[cfg(feature = "cuda-emulator")]
            Device::Emulator(_) => Ok(()),
        }
    }

    fn download(&self, x: &Tensor) -> Result<Vec<f32>, BackendError> {
        let bytes = x.memory.download(x.bytes())?;
        Ok(bytes.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect())
    }

    fn download_index(&self, index: &Index) -> Result<Vec<u32>, BackendError> {
        let bytes = index.memory.download(index.len * 4)?;
        Ok(bytes.chunks_exact(4).map(|b| u32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect())
    }

    fn rows(&self, x: &Tensor) -> usize {
        x.rows
    }

    fn cols(&self, x: &Tensor) -> usize {
        x.cols
    }

    fn reshape(&self, x: Tensor, rows: usize, cols: usize) -> Result<Tensor, BackendError> {
        assert_eq!(x.rows * x.cols, rows * cols, "elements");
        Ok(Tensor::new(x.memory, rows, cols))
    }

    fn slice_rows(&self, x: &Tensor, rows: Range<usize>) -> Result<Tensor, BackendError> {
        let out = Tensor::room(&self.device, rows.len(), x.cols)?;
        self.device.copy((&x.memory, rows.start * x.cols * 4), (&out.memory, 0), out.bytes())?;
        Ok(out)
    }

    fn copy_rows(&self, x: &Tensor, from: Range<usize>, to: &mut Tensor, at: usize) -> Result<(), BackendError> {
        assert_eq!(x.cols, to.cols, "columns");
        assert!(from.end <= x.rows && at + from.len() <= to.rows, "rows");
        to.change();
        let width = x.cols * 4;
        self.device.copy((&x.memory, from.start * width), (&to.memory, at * width), from.len() * width)
    }

    fn gather_rows(&self, x: &Tensor, index: &Index, group: usize) -> Result<Tensor, BackendError> {
        let out = Tensor::room(&self.device, index.len / group, group * x.cols)?;
        let args = [x.memory.arg(), index.memory.arg(), out.memory.arg(), Arg::U32(x.cols as u32)];
        self.device.launch("gather_rows", Grid::of(index.len, 1, 256), &args)?;
        Ok(out)
    }

    fn embed(&self, table: &Weight, ids: &Index) -> Result<Tensor, BackendError> {
        self.embed_rows(table, ids)
    }

    fn add_weighted_rows(
        &self,
        x: &mut Tensor,
        table: &Weight,
        index: &Index,
        weights: &Tensor,
    ) -> Result<(), BackendError> {
        assert_eq!((x.cols, weights.rows), (table.cols, x.rows), "columns and rows");
        let widened;
        let (kernel, memory, stride) = match table.form {
            Form::F32 | Form::Wide => ("add_weighted_rows_f32", &table.memory, table.stride),
            Form::Bf16 => ("add_weighted_rows_bf16", &table.memory, table.stride),
            Form::Fp8 | Form::Int8 | Form::Int4 => {
                // Such tables are small; nothing is gained by reading them packed.
                let rows = self.upload_index(&(0..table.rows as u32).collect::<Vec<_>>())?;
                widened = self.embed_rows(table, &rows)?;
                ("add_weighted_rows_f32", &widened.memory, table.cols)
            }
        };
        let args = [
            x.change(),
            memory.arg(),
            index.memory.arg(),
            weights.memory.arg(),
            Arg::U32(x.cols as u32),
            Arg::U32(weights.cols as u32),
            Arg::U32(stride as u32),
        ];
        self.device.launch(kernel, Grid::of(x.rows, 1, 256), &args)
    }

    fn layer_norm(&self, x: &Tensor, gamma: &Weight, beta: &Weight, eps: f32) -> Result<Tensor, BackendError> {
        assert_eq!((gamma.cols, beta.cols), (x.cols, x.cols), "columns");
        let out = Tensor::room(&self.device, x.rows, x.cols)?;
        let args =
            [x.memory.arg(), gamma.vector(), beta.vector(), out.memory.arg(), Arg::U32(x.cols as u32), Arg::F32(eps)];
        self.device.launch("layer_norm", Grid::of(x.rows, 1, 256), &args)?;
        Ok(out)
    }

    fn rms_norm(&self, x: &Tensor, gamma: &Weight, eps: f32) -> Result<Tensor, BackendError> {
        assert_eq!(gamma.cols, x.cols, "columns");
        let out = Tensor::room(&self.device, x.rows, x.cols)?;
        let args = [x.memory.arg(), gamma.vector(), out.memory.arg(), Arg::U32(x.cols as u32), Arg::F32(eps)];
        self.device.launch("rms_norm", Grid::of(x.rows, 1, 256), &args)?;
        Ok(out)
    }

    fn highest(&self, x: &Tensor, count: usize) -> Result<Option<Vec<Vec<(u32, f32)>>>, BackendError> {
        self.highest_of_rows(x, count).map(Some)
    }

    fn linear(
        &self,
        x: &Tensor,
        weight: &Weight,
        bias: Option<&Weight>,
        activation: Activation,
    ) -> Result<Tensor, BackendError> {
        let mut out = Tensor::room(&self.device, x.rows, weight.rows)?;
        self.product(x, weight, bias, &mut out, activation.into())?;
        Ok(out)
    }

    fn linear_add(
        &self,
        x: &Tensor,
        weight: &Weight,
        bias: Option<&Weight>,
        y: &mut Tensor,
    ) -> Result<(), BackendError> {
        self.product(x, weight, bias, y, Epilogue::Add)
    }

    fn gated(&self, x: &Tensor, gate: &Weight, up: &Weight) -> Result<Tensor, BackendError> {
        let mut out = Tensor::room(&self.device, x.rows, gate.rows)?;
        self.product(x, gate, None, &mut out, Epilogue::Store)?;
        self.product(x, up, None, &mut out, Epilogue::Gate)?;
        Ok(out)
    }

    fn route(
        &self,
        x: &Tensor,
        router: &Weight,
        count: usize,
        normalise: bool,
    ) -> Result<(Index, Tensor), BackendError> {
        self.route_rows(x, router, count, normalise)
    }

    fn add_experts(
        &self,
        x: &Tensor,
        experts: &[Expert<Weight>],
        chosen: &Index,
        weights: &Tensor,
        y: &mut Tensor,
    ) -> Result<(), BackendError> {
        self.experts(x, experts, chosen, weights, y)
    }

    fn rope(&self, x: &mut Tensor, heads: usize, angles: &Tensor) -> Result<(), BackendError> {
        let head_dim = x.cols / heads;
        assert_eq!((angles.rows, angles.cols), (x.rows, head_dim), "angles");
        let rows = x.rows;
        let args = [x.change(), angles.memory.arg(), Arg::U32(heads as u32), Arg::U32(head_dim as u32)];
        self.device.launch("rope", Grid::of(rows, 1, 256), &args)
    }

    fn attention(
        &self,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
        shape: AttentionShape,
        spans: &[Span],
    ) -> Result<Tensor, BackendError> {
        self.attend_spans(q, k, v, shape, spans)
    }

    fn cache(&self, spec: &CacheSpec, blocks: usize) -> Result<Cache, BackendError> {
        if spec.latent_dim > 0 {
            return Err(self.without_latent_attention());
        }
        Cache::new(&self.device, spec, blocks)
    }

    fn plan(&self, sequences: &[SequenceRows]) -> Result<Plan, BackendError> {
        Plan::new(&self.device, sequences)
    }

    fn norm_rope_write(
        &self,
        q: &mut Tensor,
        k: Tensor,
        v: Tensor,
        norm: Option<QkNorm<'_, Weight>>,
        angles: &Tensor,
        cache: &mut Cache,
        layer: usize,
        plan: &Plan,
    ) -> Result<(), BackendError> {
        let gammas = norm.as_ref().map_or([0; 2], |norm| {
            assert_eq!((norm.q.cols, norm.k.cols), (angles.cols, angles.cols), "widths of the norms");
            [norm.q, norm.k].map(|gamma| {
                gamma.vector();
                gamma.memory.address()
            })
        });
        let eps = norm.as_ref().map_or(0.0, |norm| norm.eps);
        self.write_cache(q, &k, &v, gammas, eps, angles, cache, layer, plan)
    }

    fn paged_attention(
        &self,
        q: &Tensor,
        cache: &Cache,
        layer: usize,
        plan: &Plan,
        shape: AttentionShape,
    ) -> Result<Tensor, BackendError> {
        self.attend_cached(q, cache, layer, plan, shape, None)
    }

    // On the host: the scorer is an option that few ask for, and its rows are small.
    fn round_to_fp8(&self, x: &mut Tensor, width: usize) -> Result<(), BackendError> {
        let mut rows = self.download(x)?;
        rows.chunks_exact_mut(width).for_each(fp8_rows::round);
        *x = self.upload(x.rows, x.cols, &rows)?;
        Ok(())
    }

    fn write_index_keys(
        &self,
        keys: &Tensor,
        cache: &mut Cache,
        layer: usize,
        plan: &Plan,
    ) -> Result<(), BackendError> {
        self.write_index(keys, cache, layer, plan)
    }

    fn select(
        &self,
        q: &Tensor,
        weights: &Tensor,
        cache: &Cache,
        layer: usize,
        plan: &Plan,
        shape: IndexShape,
    ) -> Result<Index, BackendError> {
        self.select_keys(q, weights, cache, layer, plan, shape)
    }

    fn sparse_attention(
        &self,
        q: &Tensor,
        cache: &Cache,
        layer: usize,
        plan: &Plan,
        shape: AttentionShape,
        selected: &Index,
    ) -> Result<Tensor, BackendError> {
        self.attend_cached(q, cache, layer, plan, shape, Some(selected))
    }
}
