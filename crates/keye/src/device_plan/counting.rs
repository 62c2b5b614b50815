//! A device that counts what it is given to keep, and computes nothing.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::{Arc, Mutex};

use keye_backend::{
    Activation, AttentionShape, Backend, BackendError, CacheSpec, Collective, Expert, IndexShape, QkNorm, SequenceRows,
    Span, WeightSource,
};

/// Bytes on a device.
#[derive(Debug, Default)]
pub struct Kept {
    /// Of weights, by the tensor that they are of.
    pub weights: BTreeMap<String, u64>,
    /// Of the cache.
    pub cache: u64,
}

/// One of several, as many as `ranks` says.
#[derive(Clone, Default)]
pub struct Counting {
    pub rank: usize,
    pub ranks: usize,
    pub kept: Arc<Mutex<Kept>>,
}

impl Counting {
    fn keep(&self, source: &WeightSource, bytes: usize) {
        *self.kept.lock().unwrap().weights.entry(source.name.clone()).or_default() += bytes as u64;
    }
}

/// What is for a step.
macro_rules! never {
    ($(fn $name:ident($($type:ty),*) -> $result:ty;)*) => {
        $(fn $name(&self, $(_: $type),*) -> $result {
            unreachable!("{}: the model is only loaded", stringify!($name))
        })*
    };
}

type Done<T = ()> = Result<T, BackendError>;

impl Backend for Counting {
    type Tensor = ();
    type Weight = ();
    type Index = ();
    type Cache = ();
    type Plan = ();

    fn load(&self, source: &WeightSource) -> Done {
        self.keep(source, source.bytes.len());
        Ok(())
    }

    fn load_columns(&self, source: &WeightSource, columns: Range<usize>) -> Done {
        self.keep(source, source.bytes.len() / source.cols * columns.len());
        Ok(())
    }

    fn cache(&self, spec: &CacheSpec, blocks: usize) -> Done {
        self.kept.lock().unwrap().cache += (spec.block_bytes() * blocks) as u64;
        Ok(())
    }

    never! {
        fn describe() -> String;
        fn zeros(usize, usize) -> Done;
        fn upload(usize, usize, &[f32]) -> Done;
        fn upload_u8(usize, usize, &[u8]) -> Done;
        fn upload_index(&[u32]) -> Done;
        fn download(&()) -> Done<Vec<f32>>;
        fn download_index(&()) -> Done<Vec<u32>>;
        fn rows(&()) -> usize;
        fn cols(&()) -> usize;
        fn reshape((), usize, usize) -> Done;
        fn slice_rows(&(), Range<usize>) -> Done;
        fn copy_rows(&(), Range<usize>, &mut (), usize) -> Done;
        fn gather_rows(&(), &(), usize) -> Done;
        fn embed(&(), &()) -> Done;
        fn add_weighted_rows(&mut (), &(), &(), &()) -> Done;
        fn layer_norm(&(), &(), &(), f32) -> Done;
        fn rms_norm(&(), &(), f32) -> Done;
        fn linear(&(), &(), Option<&()>, Activation) -> Done;
        fn linear_add(&(), &(), Option<&()>, &mut ()) -> Done;
        fn gated(&(), &(), &()) -> Done;
        fn route(&(), &(), usize, bool) -> Done<((), ())>;
        fn add_experts(&(), &[Expert<()>], &(), &(), &mut ()) -> Done;
        fn rope(&mut (), usize, &()) -> Done;
        fn attention(&(), &(), &(), AttentionShape, &[Span]) -> Done;
        fn plan(&[SequenceRows]) -> Done;
        fn norm_rope_write(&mut (), (), (), Option<QkNorm<'_, ()>>, &(), &mut (), usize, &()) -> Done;
        fn paged_attention(&(), &(), usize, &(), AttentionShape) -> Done;
        fn round_to_fp8(&mut (), usize) -> Done;
        fn write_index_keys(&(), &mut (), usize, &()) -> Done;
        fn select(&(), &(), &(), usize, &(), IndexShape) -> Done;
        fn sparse_attention(&(), &(), usize, &(), AttentionShape, &()) -> Done;
    }
}

impl Collective<Self> for Counting {
    fn rank(&self) -> usize {
        self.rank
    }
    fn ranks(&self) -> usize {
        self.ranks
    }
    never! {
        fn all_reduce_sum(&Self, &mut ()) -> Done;
        fn gather_columns(&Self, ()) -> Done<Option<()>>;
        fn broadcast(&Self, Option<()>) -> Done;
        fn abort(&str) -> ();
        fn recover() -> ();
    }
}
