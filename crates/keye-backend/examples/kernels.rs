//! How fast the CPU backend's kernels are, beside what the machine can do, both measured here and now.
//!
//! `cargo run --release -p keye-backend --example kernels [-- THREADS [PARTS]]`, parts of `products,packed,token,attention`

use std::hint::black_box;
use std::time::Instant;

use keye_backend::packed::pack_rows;
use keye_backend::{
    Activation, AttentionShape, Backend, BackendError, Cpu, CpuOptions, Dtype, Isa, Span, WeightSource,
};

/// The shortest of several runs, in seconds.
fn best(runs: usize, mut work: impl FnMut()) -> f64 {
    let time = |_| {
        let start = Instant::now();
        work();
        start.elapsed().as_secs_f64()
    };
    (0..=runs).map(time).skip(1).fold(f64::INFINITY, f64::min)
}

fn on_threads(threads: usize, work: impl Fn() + Sync) {
    std::thread::scope(|scope| (0..threads).for_each(|_| drop(scope.spawn(&work))));
}

/// Independent fused multiply-adds in registers: operations per second.
#[cfg(target_arch = "x86_64")]
fn fma_limit(isa: Isa, threads: usize) -> Option<f64> {
    use std::arch::x86_64::*;
    const ROUNDS: usize = 20_000_000;
    macro_rules! chains {
        ($name:ident, $features:literal, $set:ident, $fma:ident) => {
            #[target_feature(enable = $features)]
            fn $name() {
                let (mut acc, x) = ([$set(0.5); 12], $set(0.999));
                for _ in 0..ROUNDS {
                    for acc in &mut acc {
                        *acc = $fma(*acc, x, x);
                    }
                }
                black_box(acc);
            }
        };
    }
    chains!(avx512, "avx512f", _mm512_set1_ps, _mm512_fmadd_ps);
    chains!(avx2, "avx2,fma", _mm256_set1_ps, _mm256_fmadd_ps);
    let (lanes, run): (usize, fn()) = match isa {
        // SAFETY: the instruction set is one of those that `Isa::available` found.
        Isa::Avx512 => (16, || unsafe { avx512() }),
        // SAFETY: as above.
        Isa::Avx2 => (8, || unsafe { avx2() }),
        Isa::Portable => return None,
    };
    let seconds = best(2, || on_threads(threads, run));
    Some((threads * ROUNDS * 12 * lanes * 2) as f64 / seconds)
}

#[cfg(not(target_arch = "x86_64"))]
fn fma_limit(_isa: Isa, _threads: usize) -> Option<f64> {
    None
}

/// Streaming reads of memory far larger than the caches: bytes per second.
fn read_limit(threads: usize) -> f64 {
    const WORDS: usize = 1 << 26; // 512 MiB a thread
    let memory: Vec<Vec<u64>> = (0..threads).map(|i| vec![i as u64 + 1; WORDS]).collect();
    let seconds = best(2, || {
        std::thread::scope(|scope| {
            for memory in &memory {
                scope.spawn(|| black_box(memory.iter().fold(0u64, |sum, word| sum.wrapping_add(*word))));
            }
        });
    });
    (threads * WORDS * 8) as f64 / seconds
}

fn bf16(rows: usize, cols: usize) -> WeightSource {
    let bytes = [0x00, 0x3c].repeat(rows * cols).into();
    WeightSource { name: "random".into(), dtype: Dtype::Bf16, rows, cols, bytes, scales: None }
}

/// Random codes with plausible scales.
fn packed(dtype: Dtype, rows: usize, cols: usize) -> WeightSource {
    let values: Vec<f32> = (0..16 * cols).map(|i| ((i * 7919) % 2003) as f32 * 1e-5 - 0.01).collect();
    let mut tile = vec![0; dtype.stored_bytes(16, cols).expect("small")];
    pack_rows(dtype, 16, cols, &values, &mut tile).expect("finite");
    WeightSource { name: "random".into(), dtype, rows, cols, bytes: tile.repeat(rows / 16).into(), scales: None }
}

/// Independent int8 dot products in registers: operations per second.
#[cfg(target_arch = "x86_64")]
fn dot_limit(threads: usize) -> Option<f64> {
    use std::arch::x86_64::*;
    const ROUNDS: usize = 20_000_000;
    #[target_feature(enable = "avx512f,avx512vnni")]
    fn chains() {
        let (mut acc, x) = ([_mm512_set1_epi32(1); 12], _mm512_set1_epi32(0x0102_0304));
        for _ in 0..ROUNDS {
            for acc in &mut acc {
                *acc = _mm512_dpbusd_epi32(*acc, x, x);
            }
        }
        black_box(acc);
    }
    if !is_x86_feature_detected!("avx512vnni") {
        return None;
    }
    // SAFETY: the features are there.
    let seconds = best(2, || on_threads(threads, || unsafe { chains() }));
    Some((threads * ROUNDS * 12 * 128) as f64 / seconds)
}

#[cfg(not(target_arch = "x86_64"))]
fn dot_limit(_threads: usize) -> Option<f64> {
    None
}

fn main() -> Result<(), BackendError> {
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let threads = std::env::args().nth(1).and_then(|n| n.parse().ok()).unwrap_or(cores);
    let parts = std::env::args().nth(2);
    let wants = |part: &str| parts.as_ref().is_none_or(|parts| parts.split(',').any(|p| p == part));
    let read = read_limit(threads);
    let dots = dot_limit(threads);
    println!("limit: {:.0} GOP/s in int8", dots.unwrap_or(f64::NAN) / 1e9);
    println!("limit: reads {:.1} GB/s, {threads} threads", read / 1e9);
    // The portable kernels are there for machines without the others; `KEYE_ISA=portable` measures them.
    let fast: Vec<Isa> = Isa::available().into_iter().filter(|isa| *isa != Isa::Portable).collect();
    for isa in if std::env::var_os("KEYE_ISA").is_some() { vec![Isa::from_env()?] } else { fast } {
        let cpu = Cpu::new(CpuOptions { threads: Some(threads), isa: Some(isa) })?;
        let limit = fma_limit(isa, threads);
        let part =
            |rate: f64, limit: Option<f64>| limit.map_or(String::new(), |l| format!(", {:.0} %", 100.0 * rate / l));
        println!("{}: limit {:.0} GFLOP/s in f32", cpu.describe(), limit.unwrap_or(f64::NAN) / 1e9);
        for (m, k, n, what) in [
            (512, 1152, 4304, "vision fc1"),
            (512, 4304, 1152, "vision fc2"),
            (512, 4096, 4096, "decoder q"),
            (512, 4096, 12288, "decoder gate"),
        ]
        .into_iter()
        .filter(|_| wants("products"))
        {
            let (weight, x) = (cpu.load(&bf16(n, k))?, cpu.upload(m, k, &vec![0.5; m * k])?);
            let seconds = best(2, || drop(black_box(cpu.linear(&x, &weight, None, Activation::None))));
            let rate = (2 * m * k * n) as f64 / seconds;
            println!("  {what:13} {m} x {k} x {n}: {:6.1} GFLOP/s{}", rate / 1e9, part(rate, limit));
        }
        for (dtype, m) in [Dtype::Int4, Dtype::Int8, Dtype::Int10]
            .into_iter()
            .flat_map(|dtype| [512, 32, 8, 4].map(|m| (dtype, m)))
            .filter(|_| wants("packed"))
        {
            for (k, n) in [(1152, 4304), (4304, 1152), (4096, 4096), (4096, 12288), (12288, 4096)] {
                let (weight, x) = (cpu.load(&packed(dtype, n, k))?, cpu.upload(m, k, &vec![0.5; m * k])?);
                let seconds = best(2, || drop(black_box(cpu.linear(&x, &weight, None, Activation::None))));
                let rate = (2 * m * k * n) as f64 / seconds;
                println!("  {dtype:?} {m} x {k} x {n}: {:6.1} GOP/s{}", rate / 1e9, part(rate, dots));
            }
        }
        for dtype in [Dtype::Int4, Dtype::Int8].into_iter().filter(|_| wants("token")) {
            let weights = (0..16).map(|_| cpu.load(&packed(dtype, 12288, 4096))).collect::<Result<Vec<_>, _>>()?;
            let x = cpu.upload(1, 4096, &vec![0.5; 4096])?;
            let seconds =
                best(2, || weights.iter().for_each(|w| drop(black_box(cpu.linear(&x, w, None, Activation::None)))));
            let rate = (16 * dtype.stored_bytes(12288, 4096).unwrap_or(0)) as f64 / seconds;
            println!("  {dtype:?} one token 1 x 4096 x 12288: {:5.1} GB/s{}", rate / 1e9, part(rate, Some(read)));
        }
        if wants("token") {
            let weights = (0..8).map(|_| cpu.load(&bf16(12288, 4096))).collect::<Result<Vec<_>, _>>()?;
            let x = cpu.upload(1, 4096, &vec![0.5; 4096])?;
            let seconds =
                best(2, || weights.iter().for_each(|w| drop(black_box(cpu.linear(&x, w, None, Activation::None)))));
            let rate = (weights.len() * 12288 * 4096 * 2) as f64 / seconds;
            println!("  one token     1 x 4096 x 12288: {:5.1} GB/s{}", rate / 1e9, part(rate, Some(read)));
        }
        for (rows, spans) in [(1024, 1), (4096, 8), (4096, 1)].into_iter().filter(|_| wants("attention")) {
            let (heads, head_dim) = (16, 72);
            let shape = AttentionShape { heads, kv_heads: heads, head_dim, scale: 0.1 };
            let q = cpu.upload(rows, heads * head_dim, &vec![0.1; rows * heads * head_dim])?;
            let len = rows / spans;
            let list: Vec<Span> =
                (0..spans).map(|i| Span { queries: i * len..(i + 1) * len, keys: i * len..(i + 1) * len }).collect();
            let seconds = best(1, || drop(black_box(cpu.attention(&q, &q, &q, shape, &list))));
            let rate = (4 * spans * len * len * heads * head_dim) as f64 / seconds;
            println!("  attention     {spans} x {len} patches: {:6.1} GFLOP/s{}", rate / 1e9, part(rate, limit));
        }
    }
    Ok(())
}
