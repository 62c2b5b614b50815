//! How fast the important operations are, beside floors measured in the same run: the copy of a gigabyte on the device, and,
//! where cuBLASLt is found, its bf16 product of the same shape. Wall clock over many launches, after warming up.

use std::time::Instant;

use anyhow::Result;
use keye_backend::{
    AttentionShape, BLOCK_TOKENS, Backend, BackendError, BlockScales, CacheSpec, Cuda, CudaOptions, Dtype, KvDtype,
    SequenceRows, Span, WeightSource, packed,
};

use super::report::Timed;

type Add<'a> = &'a mut dyn FnMut(Timed) -> Result<()>;

/// All timings, a line each.
pub fn measure(device: usize, add: Add<'_>) -> Result<()> {
    let cuda = Cuda::new(CudaOptions { device, ..CudaOptions::default() })?;
    let library = Cuda::new(CudaOptions { device, library: true, ..CudaOptions::default() }).ok();
    launches(&cuda, add)?;
    let bandwidth = copy(&cuda, add)?;
    products(&cuda, library.as_ref(), bandwidth, add)?;
    vision_attention(&cuda, add)?;
    cached_attention(&cuda, bandwidth, add)
}

/// Seconds of work between two waits for the device: many times what a wait itself takes.
const STRETCH: f64 = 0.01;
/// Seconds of a measurement.
const LONG_ENOUGH: f64 = 0.2;

/// Seconds of one run of `work`, over enough runs to matter. What it launches should take no memory: that is timed with it.
fn time<B: Backend, T>(b: &B, mut work: impl FnMut() -> Result<T, BackendError>) -> Result<f64, BackendError> {
    let mut stretch = |runs: u32| -> Result<f64, BackendError> {
        let start = Instant::now();
        for _ in 0..runs {
            work()?;
        }
        b.synchronize()?;
        Ok(start.elapsed().as_secs_f64())
    };
    stretch(3)?;
    let at_once = (STRETCH * 5.0 / stretch(5)?.max(1e-9)).ceil().clamp(1.0, 10_000.0) as u32;
    let (mut seconds, mut runs) = (0.0, 0.0);
    while seconds < LONG_ENOUGH {
        seconds += stretch(at_once)?;
        runs += f64::from(at_once);
    }
    Ok(seconds / runs)
}

/// Copies of `bytes` bytes of weights that are used in turn: more than any second-level cache holds.
fn copies(bytes: usize) -> usize {
    (256_usize << 20).div_ceil(bytes.max(1)).max(4)
}

/// Rows of numbers: zeros would be computed faster.
fn random(cuda: &Cuda, rows: usize, cols: usize) -> Result<<Cuda as Backend>::Tensor, BackendError> {
    let value = |i: usize| ((i.wrapping_mul(2_654_435_761) >> 9) % 2003) as f32 * 1e-3 - 1.0;
    cuda.upload(rows, cols, &(0..rows * cols).map(value).collect::<Vec<_>>())
}

/// Numbers without meaning, of a type.
fn weight(dtype: Dtype, rows: usize, cols: usize) -> WeightSource {
    let value = |i: usize| ((i.wrapping_mul(2_654_435_761) >> 7) % 2001) as f32 * 1e-4 - 0.1;
    let (mut scales, name) = (None, "random".into());
    let bytes: Vec<u8> = match dtype {
        Dtype::Bf16 => (0..rows * cols).flat_map(|i| ((value(i).to_bits() >> 16) as u16).to_le_bytes()).collect(),
        Dtype::F8E4M3 => {
            let of_blocks = vec![0.01f32; rows.div_ceil(128) * cols.div_ceil(128)];
            let bytes = of_blocks.into_iter().flat_map(f32::to_le_bytes).collect::<Vec<u8>>().into();
            scales = Some(BlockScales { bytes, block: [128, 128], first_row: 0 });
            (0..rows * cols).map(|i| (i % 120) as u8).collect()
        }
        _ => {
            // One tile's worth is packed and repeated: the search for scales takes long.
            let values: Vec<f32> = (0..packed::TILE_ROWS * cols).map(value).collect();
            let mut tile = vec![0; packed::tile_bytes(dtype, cols).unwrap_or(0)];
            packed::pack_rows(dtype, packed::TILE_ROWS, cols, &values, &mut tile).unwrap_or(());
            tile.repeat(rows / packed::TILE_ROWS)
        }
    };
    WeightSource { name, dtype, rows, cols, bytes: bytes.into(), scales }
}

/// What a launch takes that does next to nothing: the floor of all operations.
fn launches(b: &Cuda, add: Add<'_>) -> Result<()> {
    let (mut x, angles) = (b.zeros(1, 8)?, b.zeros(1, 8)?);
    let seconds = time(b, || b.rope(&mut x, 1, &angles))?;
    add(Timed {
        group: "launches: the floor of each operation",
        name: "an almost empty kernel".into(),
        seconds,
        rate: 1e-3 / seconds,
        unit: "thousand/s",
        fraction: None,
    })
}

/// Bytes per second, read and written.
fn copy(b: &Cuda, add: Add<'_>) -> Result<f64> {
    let rows = 1 << 18;
    let (from, mut to) = (b.zeros(rows, 1024)?, b.zeros(rows, 1024)?);
    let seconds = time(b, || b.copy_rows(&from, 0..rows, &mut to, 0))?;
    let bandwidth = 2.0 * (rows * 1024 * 4) as f64 / seconds;
    add(Timed {
        group: "memory, bytes read and written: the floor of what follows",
        name: "copy of 1 GiB".into(),
        seconds,
        rate: bandwidth / 1e9,
        unit: "GB/s",
        fraction: None,
    })?;
    Ok(bandwidth)
}

/// Weights come from memory, results are added to an output that is there. Few rows are compared with the bandwidth, many with
/// cuBLASLt.
fn products(b: &Cuda, library: Option<&Cuda>, bandwidth: f64, add: Add<'_>) -> Result<()> {
    const FEW: [usize; 3] = [1, 8, 32];
    const MANY: [usize; 3] = [128, 1024, 4096];
    let group = "products: few rows of the bandwidth, many of cuBLASLt's bf16";
    for (cols, outputs) in [(4096, 4096), (4096, 12288), (12288, 4096)] {
        let shape = format!("{cols} -> {outputs}");
        let operations = |rows: usize| 2.0 * (rows * cols * outputs) as f64;
        let mut floors = [None; MANY.len()];
        if let Some(b) = library {
            let product = Product::new(b, &weight(Dtype::Bf16, outputs, cols))?;
            for (rows, floor) in MANY.into_iter().zip(&mut floors) {
                let seconds = product.seconds(rows)?;
                *floor = Some(seconds);
                let (rate, name) = (operations(rows) / seconds / 1e12, format!("cuBLASLt {shape}, {rows} rows"));
                add(Timed { group, name, seconds, rate, unit: "TFLOP/s", fraction: None })?;
            }
        }
        for dtype in [Dtype::Bf16, Dtype::F8E4M3, Dtype::Int8, Dtype::Int4] {
            let source = weight(dtype, outputs, cols);
            let product = Product::new(b, &source)?;
            for rows in FEW {
                let (seconds, name) = (product.seconds(rows)?, format!("{dtype:?} {shape}, {rows} rows"));
                let rate = source.bytes.len() as f64 / seconds;
                let fraction = Some(rate / bandwidth);
                add(Timed { group, name, seconds, rate: rate / 1e9, unit: "GB/s", fraction })?;
            }
            for (rows, floor) in MANY.into_iter().zip(floors) {
                let (seconds, name) = (product.seconds(rows)?, format!("{dtype:?} {shape}, {rows} rows"));
                let rate = operations(rows) / seconds / 1e12;
                let fraction = floor.map(|floor| floor / seconds);
                add(Timed { group, name, seconds, rate, unit: "TFLOP/s", fraction })?;
            }
        }
    }
    Ok(())
}

/// A product with each of some copies of a weight in turn.
struct Product<'a> {
    b: &'a Cuda,
    weights: Vec<<Cuda as Backend>::Weight>,
    cols: usize,
    outputs: usize,
}

impl<'a> Product<'a> {
    fn new(b: &'a Cuda, source: &WeightSource) -> Result<Self, BackendError> {
        let weights = (0..copies(source.bytes.len())).map(|_| b.load(source)).collect::<Result<Vec<_>, _>>()?;
        Ok(Self { b, weights, cols: source.cols, outputs: source.rows })
    }

    fn seconds(&self, rows: usize) -> Result<f64, BackendError> {
        let x = random(self.b, rows, self.cols)?;
        let mut y = self.b.zeros(rows, self.outputs)?;
        let mut turn = 0;
        time(self.b, || {
            turn += 1;
            self.b.linear_add(&x, &self.weights[turn % self.weights.len()], None, &mut y)
        })
    }
}

/// Output and list of spans are made anew each time, as in a model.
fn vision_attention(b: &Cuda, add: Add<'_>) -> Result<()> {
    let shape = AttentionShape { heads: 16, kv_heads: 16, head_dim: 72, scale: 0.118 };
    for (spans, patches) in [(16, 512), (1, 4096)] {
        let rows = spans * patches;
        let [q, k, v] = [(); 3].map(|()| random(b, rows, 16 * 72));
        let (q, k, v) = (q?, k?, v?);
        let of_rows = |rows: std::ops::Range<usize>| Span { queries: rows.clone(), keys: rows };
        let list: Vec<Span> = (0..spans).map(|i| of_rows(i * patches..(i + 1) * patches)).collect();
        let seconds = time(b, || b.attention(&q, &k, &v, shape, &list))?;
        let rate = 4.0 * (spans * patches * patches * 16 * 72) as f64 / seconds / 1e12;
        let (group, name) = ("vision attention, 16 heads of 72", format!("{spans} spans of {patches}"));
        add(Timed { group, name, seconds, rate, unit: "TFLOP/s", fraction: None })?;
    }
    Ok(())
}

/// The output is made anew each time, as in a model.
fn cached_attention(b: &Cuda, bandwidth: f64, add: Add<'_>) -> Result<()> {
    let group = "attention over the cache, 32 query and 8 key heads of 128, bf16";
    let shape = AttentionShape { heads: 32, kv_heads: 8, head_dim: 128, scale: 0.088 };
    let spec = CacheSpec { layers: 1, kv_heads: 8, head_dim: 128, dtype: KvDtype::Bf16, index_dim: 0, latent_dim: 0 };
    for (sequences, rows, context) in [(1, 4096, 4096), (1, 1, 1024), (32, 1, 1024), (1, 1, 32768), (8, 1, 32768)] {
        let blocks = context / BLOCK_TOKENS;
        let cache = b.cache(&spec, blocks * sequences)?;
        let sequence = |i: usize| SequenceRows {
            rows: i * rows..(i + 1) * rows,
            start: context - rows,
            block_table: (i * blocks..(i + 1) * blocks).map(|block| block as u32).collect(),
        };
        let plan = b.plan(&(0..sequences).map(sequence).collect::<Vec<_>>())?;
        let q = random(b, sequences * rows, 32 * 128)?;
        let seconds = time(b, || b.paged_attention(&q, &cache, 0, &plan, shape))?;
        add(if rows > 1 {
            let rate = 2.0 * (rows * rows * 32 * 128) as f64 / seconds / 1e12;
            Timed { group, name: format!("prompt of {rows}"), seconds, rate, unit: "TFLOP/s", fraction: None }
        } else {
            let rate = (sequences * context * 2 * 8 * 128 * 2) as f64 / seconds;
            let (name, fraction) =
                (format!("{sequences} sequences of {context}, a token each"), Some(rate / bandwidth));
            Timed { group, name, seconds, rate: rate / 1e9, unit: "GB/s", fraction }
        })?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use keye_backend::Reference;

    use super::*;

    #[test]
    fn a_run_is_timed_over_many() {
        let mut runs = 0;
        let nap = std::time::Duration::from_millis(4);
        let seconds = time(&Reference, || {
            runs += 1;
            std::thread::sleep(nap);
            Ok(())
        });
        let seconds = seconds.unwrap();
        assert!(seconds >= nap.as_secs_f64() && runs > 8, "{seconds} s, {runs} runs");
    }

    #[test]
    fn copies_are_more_than_a_cache_holds() {
        assert_eq!([1 << 20, 32 << 20, 33 << 20, 96 << 20, 1 << 30].map(copies), [256, 8, 8, 4, 4]);
    }
}
