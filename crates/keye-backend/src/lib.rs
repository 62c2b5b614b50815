//! Device memory, weight formats and fused operations behind one trait.
//!
//! **In**: weights as slices of a memory map ([`WeightSource`]), rows of activations, small integer arrays. **Out**: the
//! operations that the Keye-VL models are made of ([`Backend`]), coarse enough that a device can run each as one launch.
//!
//! What it promises:
//!
//! * [`Reference`] is the definition: scalar f32, one loop a formula. Every other backend is compared with it by one
//!   suite ([`conformance`]).
//! * [`Cpu`] computes on all cores with AVX-512, AVX2 or portable code, chosen when it is made; `KEYE_ISA` forces one.
//!   Weights stored as f32, bf16, 8-bit floats in blocks or [`packed`] int4 to int12 are used in place in the memory map.
//! * **Row invariance**: a row of a result depends only on that row's inputs. The order of every sum is fixed by its
//!   length (and, in attention over the cache, by absolute 64-token blocks from left to right), never by the number of
//!   rows, of threads, or by how rows were cut into calls. The suite checks it bit for bit.
//! * No operation stores more than a tile of attention scores.
//! * Devices that share a model meet in a [`Collective`]; sums over them have one order.
//!
//! No model names here: what a tensor means is `keye-model`'s business.

mod backend;
mod coded_rows;
mod collective;
mod column_copy;
pub mod conformance;
mod cpu;
#[cfg(feature = "cuda")]
pub mod cuda;
mod error;
mod fp8;
pub mod fp8_rows;
mod grouped_routing;
mod host;
mod input_major;
mod int8_rows;
pub mod packed;
mod packed_search;
mod reference;
mod select;
mod spare;
pub mod training;
mod weight;
mod wide_tiles;

pub use backend::{
    Activation, AttentionShape, BLOCK_TOKENS, Backend, CacheSpec, Expert, GroupedRouting, IndexShape, KvDtype,
    LatentShape, QkNorm, SequenceRows, Span,
};
pub use collective::{Collective, SharedMemory};
pub use cpu::matmul;
pub use cpu::{Cpu, CpuOptions, Isa};
#[cfg(feature = "cuda")]
pub use cuda::{Cuda, CudaOptions, Products};
pub use error::BackendError;
pub use fp8::BlockScales;
pub use reference::Reference;
pub use select::UNSELECTED;
pub use weight::{Dtype, WeightSource, f32_to_bf16};
