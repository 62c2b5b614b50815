//! Streaming reads.

use std::hint::black_box;

use crate::best;

/// Read by each thread: over 1 GB.
const BYTES: usize = 1 << 30;
/// Places that a thread reads from in turn, and how far ahead it asks for lines.
const STREAMS: usize = 4;
const AHEAD: usize = 2048;

/// Bytes per second over all threads.
pub(crate) fn rate(threads: usize) -> f64 {
    // Half of the free memory at most.
    let bytes = BYTES.min(free_memory() / 2 / threads).max(1 << 26) / (STREAMS * 4096) * (STREAMS * 4096);
    let memory: Vec<Memory> = (0..threads).map(|_| Memory::new(bytes)).collect();
    // Each pattern suits other machines; the best is the limit.
    let streams = best(threads, |thread| {
        black_box(sum_streams(memory[thread].bytes()));
    });
    let one = best(threads, |thread| {
        black_box(sum(memory[thread].bytes()));
    });
    (threads * bytes) as f64 / streams.min(one)
}

/// What the system says is free, in bytes.
fn free_memory() -> usize {
    let text = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let line = text.lines().find_map(|line| line.strip_prefix("MemAvailable:"));
    let kilobytes = line.and_then(|line| line.trim().strip_suffix("kB")?.trim().parse::<usize>().ok());
    kilobytes.map_or(usize::MAX, |kilobytes| kilobytes.saturating_mul(1024))
}

/// Zeroed memory in huge pages where there are any, every page touched.
struct Memory(Vec<u64>);

impl Memory {
    fn new(bytes: usize) -> Self {
        let mut words: Vec<u64> = Vec::with_capacity(bytes / 8);
        #[cfg(target_os = "linux")]
        // SAFETY: advice on memory that this vector owns; it does not change its content.
        unsafe {
            let start = (words.as_mut_ptr() as usize).next_multiple_of(4096);
            libc::madvise(start as *mut libc::c_void, bytes - 4096, libc::MADV_HUGEPAGE);
        }
        // Other values than zero, so that no page is the shared page of zeros.
        words.resize(bytes / 8, 0x0101_0101_0101_0101);
        Self(words)
    }

    fn bytes(&self) -> &[u64] {
        &self.0
    }
}

fn sum(words: &[u64]) -> u64 {
    #[cfg(target_arch = "x86_64")]
    {
        if is_x86_feature_detected!("avx512f") {
            // SAFETY: the instruction set is there.
            return unsafe { x86::one_avx512(words) };
        }
        if is_x86_feature_detected!("avx2") {
            // SAFETY: the instruction set is there.
            return unsafe { x86::one_avx2(words) };
        }
    }
    words.iter().fold(0, |sum, word| sum ^ word)
}

fn sum_streams(words: &[u64]) -> u64 {
    #[cfg(target_arch = "x86_64")]
    {
        if is_x86_feature_detected!("avx512f") {
            // SAFETY: the instruction set is there.
            return unsafe { x86::streams_avx512(words) };
        }
        if is_x86_feature_detected!("avx2") {
            // SAFETY: the instruction set is there.
            return unsafe { x86::streams_avx2(words) };
        }
    }
    sum(words)
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::*;

    use super::{AHEAD, STREAMS};

    macro_rules! reads {
        ($one:ident, $streams:ident, $features:literal, $vector:ty, $zero:ident, $load:ident, $xor:ident) => {
            /// One stream, eight loads at a time.
            #[target_feature(enable = $features)]
            pub(super) unsafe fn $one(words: &[u64]) -> u64 {
                const LANES: usize = size_of::<$vector>() / 8;
                let mut acc = [$zero(); 8];
                for words in words.chunks_exact(8 * LANES) {
                    for (i, acc) in acc.iter_mut().enumerate() {
                        // SAFETY: within the chunk; the load has no alignment.
                        *acc = $xor(*acc, unsafe { $load(words.as_ptr().add(i * LANES).cast()) });
                    }
                }
                let all = acc.into_iter().reduce(|a, b| $xor(a, b)).unwrap_or($zero());
                // SAFETY: a vector is at least one u64.
                unsafe { std::mem::transmute_copy::<$vector, u64>(&all) }
            }

            /// Several streams side by side, each a cache line pair at a time, with lines asked for ahead.
            #[target_feature(enable = $features)]
            pub(super) unsafe fn $streams(words: &[u64]) -> u64 {
                const LANES: usize = size_of::<$vector>() / 8;
                const STEP: usize = 16; // words: two cache lines
                let mut acc = [$zero(); STREAMS];
                let part = words.len() / STREAMS / STEP * STEP;
                for at in (0..part).step_by(STEP) {
                    for (stream, acc) in acc.iter_mut().enumerate() {
                        // SAFETY: `stream * part + at + STEP` is at most the length; prefetches may point anywhere.
                        unsafe {
                            let line = words.as_ptr().add(stream * part + at);
                            _mm_prefetch::<_MM_HINT_T0>(line.cast::<i8>().wrapping_add(AHEAD));
                            _mm_prefetch::<_MM_HINT_T0>(line.cast::<i8>().wrapping_add(AHEAD + 64));
                            for i in 0..STEP / LANES {
                                *acc = $xor(*acc, $load(line.add(i * LANES).cast()));
                            }
                        }
                    }
                }
                let all = acc.into_iter().reduce(|a, b| $xor(a, b)).unwrap_or($zero());
                // SAFETY: a vector is at least one u64.
                unsafe { std::mem::transmute_copy::<$vector, u64>(&all) }
            }
        };
    }
    reads!(one_avx512, streams_avx512, "avx512f", __m512i, _mm512_setzero_si512, _mm512_loadu_si512, _mm512_xor_si512);
    reads!(one_avx2, streams_avx2, "avx2", __m256i, _mm256_setzero_si256, _mm256_loadu_si256, _mm256_xor_si256);
}
