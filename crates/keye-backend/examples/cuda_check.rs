//! What a GPU is asked first: is every operation right, and how fast are the important ones beside the chip's own limits.
//!
//! `cargo run --release -p keye-backend --features cuda --example cuda_check [-- --quick]`
//!
//! Exit status 0 when everything is right. Timings are wall clock over many launches, after warming up; floors are measured
//! here: the copy of a gigabyte on the device, and, where cuBLASLt is found, its bf16 product.

use std::process::ExitCode;
use std::time::Instant;

use keye_backend::{
    Activation, AttentionShape, BLOCK_TOKENS, Backend, BackendError, CacheSpec, Cuda, CudaOptions, Dtype, KvDtype,
    Products, SequenceRows, Span, WeightSource, conformance, packed,
};

fn main() -> ExitCode {
    let quick = std::env::args().any(|arg| arg == "--quick");
    match check(quick) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("{error}");
            ExitCode::FAILURE
        }
    }
}

fn check(quick: bool) -> Result<bool, BackendError> {
    let mut right = true;
    for (products, tolerance) in [(Products::F32, 2e-5), (Products::Bf16, 0.15)] {
        let start = Instant::now();
        let cuda = Cuda::new(CudaOptions { products, ..CudaOptions::default() })?;
        println!("{}: started in {:.2} s", cuda.describe(), start.elapsed().as_secs_f64());
        let start = Instant::now();
        let mut checks = conformance::run(&cuda, tolerance)?;
        checks.extend(conformance::run_fp8(&cuda, tolerance)?);
        let failed: Vec<_> = checks.iter().filter(|check| !check.passed()).collect();
        println!(
            "  {} checks in {:.1} s, {} failed; largest error {:.1e}, allowed {tolerance:.1e}",
            checks.len(),
            start.elapsed().as_secs_f64(),
            failed.len(),
            checks.iter().map(|check| check.error).fold(0.0, f32::max)
        );
        for check in &failed {
            println!("  FAILED {}: {:.2e} > {:.1e}", check.name, check.error, check.tolerance);
        }
        right &= failed.is_empty();
    }
    right &= library_agrees()?;
    if !quick {
        timings()?;
    }
    Ok(right)
}

/// cuBLASLt's products beside our own, which the suite has checked.
fn library_agrees() -> Result<bool, BackendError> {
    let own = Cuda::new(CudaOptions::default())?;
    let Ok(library) = Cuda::new(CudaOptions { library: true, ..CudaOptions::default() }) else { return Ok(true) };
    let (rows, cols, outputs) = (200, 588, 320);
    let source = weight(Dtype::Bf16, outputs, cols);
    let bias = WeightSource::from_f32("bias", 1, outputs, &vec![0.5; outputs]);
    let results = [&own, &library].map(|b| -> Result<Vec<f32>, BackendError> {
        let (x, weight, bias) = (random(b, rows, cols)?, b.load(&source)?, b.load(&bias)?);
        let mut y = b.linear(&x, &weight, None, Activation::None)?;
        b.linear_add(&x, &weight, None, &mut y)?;
        let mut out = b.download(&y)?;
        out.extend(b.download(&b.linear(&x, &weight, Some(&bias), Activation::GeluTanh)?)?);
        out.extend(b.download(&b.gated(&x, &weight, &weight)?)?);
        Ok(out)
    });
    let [own, library] = results;
    let (own, library) = (own?, library?);
    let difference = own.iter().zip(&library).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
    println!("cuBLASLt beside our own products: largest difference {difference:.1e}");
    Ok(difference < 1e-3)
}

/// Seconds of one run of `work`, over enough runs to matter.
fn time<T>(cuda: &Cuda, mut work: impl FnMut() -> Result<T, BackendError>) -> Result<f64, BackendError> {
    for _ in 0..3 {
        work()?;
    }
    cuda.synchronize()?;
    let (start, mut runs) = (Instant::now(), 0);
    while runs < 10 || (start.elapsed().as_secs_f64() < 0.3 && runs < 2000) {
        for _ in 0..10 {
            work()?;
        }
        cuda.synchronize()?;
        runs += 10;
    }
    Ok(start.elapsed().as_secs_f64() / f64::from(runs))
}

/// Rows of numbers: zeros would be computed faster.
fn random(cuda: &Cuda, rows: usize, cols: usize) -> Result<<Cuda as Backend>::Tensor, BackendError> {
    let value = |i: usize| ((i.wrapping_mul(2_654_435_761) >> 9) % 2003) as f32 * 1e-3 - 1.0;
    cuda.upload(rows, cols, &(0..rows * cols).map(value).collect::<Vec<_>>())
}

/// Numbers without meaning, of a type.
fn weight(dtype: Dtype, rows: usize, cols: usize) -> WeightSource {
    let value = |i: usize| ((i.wrapping_mul(2_654_435_761) >> 7) % 2001) as f32 * 1e-4 - 0.1;
    let name = "random";
    match dtype {
        Dtype::Bf16 => {
            let bytes = (0..rows * cols).flat_map(|i| ((value(i).to_bits() >> 16) as u16).to_le_bytes());
            let bytes = bytes.collect::<Vec<u8>>().into();
            WeightSource { name: name.into(), dtype, rows, cols, bytes, scales: None }
        }
        Dtype::F8E4M3 => {
            let scales = vec![0.01f32; rows.div_ceil(128) * cols.div_ceil(128)];
            let bytes = scales.into_iter().flat_map(f32::to_le_bytes).collect::<Vec<u8>>().into();
            let scales = Some(keye_backend::BlockScales { bytes, block: [128, 128], first_row: 0 });
            let bytes = (0..rows * cols).map(|i| (i % 120) as u8).collect::<Vec<u8>>().into();
            WeightSource { name: name.into(), dtype, rows, cols, bytes, scales }
        }
        _ => {
            // One tile's worth is packed and repeated: the search for scales takes long.
            let values: Vec<f32> = (0..packed::TILE_ROWS * cols).map(value).collect();
            let mut tile = vec![0; packed::tile_bytes(dtype, cols).unwrap_or(0)];
            packed::pack_rows(dtype, packed::TILE_ROWS, cols, &values, &mut tile).unwrap_or(());
            let bytes = tile.repeat(rows / packed::TILE_ROWS).into();
            WeightSource { name: name.into(), dtype, rows, cols, bytes, scales: None }
        }
    }
}

fn timings() -> Result<(), BackendError> {
    let cuda = Cuda::new(CudaOptions::default())?;
    let library = Cuda::new(CudaOptions { library: true, ..CudaOptions::default() });
    if let Err(error) = &library {
        println!("without cuBLASLt: {error}");
    }
    let b = &cuda;
    let large = b.zeros(1 << 18, 1024)?;
    let mut target = b.zeros(1 << 18, 1024)?;
    let seconds = time(b, || b.copy_rows(&large, 0..1 << 18, &mut target, 0))?;
    let bandwidth = 2.0 * f64::from(1u32 << 30) / seconds;
    println!("copy of 1 GiB: {:.0} GB/s, bytes read and written; floor of what follows", bandwidth / 1e9);
    drop((large, target));

    println!("\nproducts, weights read from memory (four copies of each, in turn)");
    for (cols, rows) in [(4096, 4096), (4096, 12288), (12288, 4096)] {
        for dtype in [Dtype::Bf16, Dtype::F8E4M3, Dtype::Int8, Dtype::Int4] {
            let source = weight(dtype, rows, cols);
            let weights = (0..4).map(|_| b.load(&source)).collect::<Result<Vec<_>, _>>()?;
            let mut line = format!("  {dtype:?} {cols} -> {rows}:");
            for batch in [1, 8, 32, 128, 1024, 4096] {
                let x = random(b, batch, cols)?;
                let mut turn = 0;
                let seconds = time(b, || {
                    turn += 1;
                    b.linear(&x, &weights[turn % 4], None, Activation::None)
                })?;
                let operations = 2.0 * (batch * rows * cols) as f64;
                line += &match batch {
                    ..=32 => {
                        let bytes = source.bytes.len() as f64 / seconds;
                        format!("  {batch} rows {:.1} us {:.0} %", seconds * 1e6, bytes / bandwidth * 100.0)
                    }
                    _ => format!("  {batch} rows {:.0} TFLOP/s", operations / seconds / 1e12),
                };
            }
            println!("{line}");
        }
        if let Ok(b) = &library {
            let weight = b.load(&weight(Dtype::Bf16, rows, cols))?;
            let mut line = format!("  cuBLASLt {cols} -> {rows}:");
            for batch in [128, 1024, 4096] {
                let x = random(b, batch, cols)?;
                let seconds = time(b, || b.linear(&x, &weight, None, Activation::None))?;
                line += &format!("  {batch} rows {:.0} TFLOP/s", 2.0 * (batch * rows * cols) as f64 / seconds / 1e12);
            }
            println!("{line}");
        }
    }

    println!("\nvision attention, 16 heads of 72");
    for (spans, patches) in [(16, 512), (1, 4096)] {
        let rows = spans * patches;
        let [q, k, v] = [(); 3].map(|()| random(b, rows, 16 * 72));
        let (q, k, v) = (q?, k?, v?);
        let shape = AttentionShape { heads: 16, kv_heads: 16, head_dim: 72, scale: 0.118 };
        let spans: Vec<Span> =
            (0..spans).map(|i| i * patches..(i + 1) * patches).map(|r| Span { queries: r.clone(), keys: r }).collect();
        let seconds = time(b, || b.attention(&q, &k, &v, shape, &spans))?;
        let operations = 4.0 * (spans.len() * patches * patches * 16 * 72) as f64;
        println!(
            "  {} spans of {patches}: {:.0} us, {:.0} TFLOP/s",
            spans.len(),
            seconds * 1e6,
            operations / seconds / 1e12
        );
    }

    println!("\nattention over the cache, 32 query and 8 key heads of 128, bf16");
    let shape = AttentionShape { heads: 32, kv_heads: 8, head_dim: 128, scale: 0.088 };
    let spec = CacheSpec { layers: 1, kv_heads: 8, head_dim: 128, dtype: KvDtype::Bf16, index_dim: 0, latent_dim: 0 };
    for (sequences, rows, context) in [(1, 4096, 4096), (1, 1, 1024), (32, 1, 1024), (1, 1, 32768), (8, 1, 32768)] {
        let blocks = context / BLOCK_TOKENS;
        let cache = b.cache(&spec, blocks * sequences)?;
        let plan: Vec<SequenceRows> = (0..sequences)
            .map(|i| SequenceRows {
                rows: i * rows..(i + 1) * rows,
                start: context - rows,
                block_table: (i * blocks..(i + 1) * blocks).map(|block| block as u32).collect(),
            })
            .collect();
        let plan = b.plan(&plan)?;
        let q = random(b, sequences * rows, 32 * 128)?;
        let seconds = time(b, || b.paged_attention(&q, &cache, 0, &plan, shape))?;
        let us = seconds * 1e6;
        if rows > 1 {
            let operations = 2.0 * (rows * rows * 32 * 128) as f64;
            println!("  prompt of {rows}: {us:.0} us, {:.0} TFLOP/s", operations / seconds / 1e12);
        } else {
            let bytes = (sequences * context * 2 * 8 * 128 * 2) as f64;
            let part = bytes / seconds / bandwidth * 100.0;
            println!("  {sequences} sequences, {context} tokens of context: {us:.1} us, {part:.0} %");
        }
    }
    Ok(())
}
