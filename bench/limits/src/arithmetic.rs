//! Independent multiply-adds in registers: operations per second over all threads, a multiply-add counted as two.

/// Accumulators: more than latency times throughput asks for on any machine, and they fit the registers.
#[cfg(target_arch = "x86_64")]
const CHAINS: usize = 12;
#[cfg(target_arch = "x86_64")]
const ROUNDS: usize = 8_000_000;

#[cfg(not(target_arch = "x86_64"))]
pub(crate) fn int8(_threads: usize) -> Option<f64> {
    None
}

#[cfg(not(target_arch = "x86_64"))]
pub(crate) fn f16(_threads: usize) -> Option<f64> {
    None
}

#[cfg(not(target_arch = "x86_64"))]
pub(crate) fn f32(_threads: usize) -> Option<f64> {
    None
}

#[cfg(target_arch = "x86_64")]
pub(crate) use x86::{f16, f32, int8};

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::asm;

    use super::{CHAINS, ROUNDS};
    use crate::best;

    /// A loop of [`CHAINS`] times the instruction, each on a register of its own. In assembly, so that no compiler sees
    /// through it; registers 12 and 13 are the operands.
    macro_rules! chains {
        ($name:ident, $reg:literal, $instruction:literal) => {
            unsafe fn $name() {
                // SAFETY: registers only, all of them named; the caller has checked the instruction set.
                unsafe {
                    asm!(
                        "vpxor xmm12, xmm12, xmm12",
                        "vpxor xmm13, xmm13, xmm13",
                        "2:",
                        concat!($instruction, " ", $reg, "0, ", $reg, "12, ", $reg, "13"),
                        concat!($instruction, " ", $reg, "1, ", $reg, "12, ", $reg, "13"),
                        concat!($instruction, " ", $reg, "2, ", $reg, "12, ", $reg, "13"),
                        concat!($instruction, " ", $reg, "3, ", $reg, "12, ", $reg, "13"),
                        concat!($instruction, " ", $reg, "4, ", $reg, "12, ", $reg, "13"),
                        concat!($instruction, " ", $reg, "5, ", $reg, "12, ", $reg, "13"),
                        concat!($instruction, " ", $reg, "6, ", $reg, "12, ", $reg, "13"),
                        concat!($instruction, " ", $reg, "7, ", $reg, "12, ", $reg, "13"),
                        concat!($instruction, " ", $reg, "8, ", $reg, "12, ", $reg, "13"),
                        concat!($instruction, " ", $reg, "9, ", $reg, "12, ", $reg, "13"),
                        concat!($instruction, " ", $reg, "10, ", $reg, "12, ", $reg, "13"),
                        concat!($instruction, " ", $reg, "11, ", $reg, "12, ", $reg, "13"),
                        "dec {rounds}",
                        "jnz 2b",
                        rounds = inout(reg) ROUNDS => _,
                        out("xmm0") _, out("xmm1") _, out("xmm2") _, out("xmm3") _, out("xmm4") _, out("xmm5") _,
                        out("xmm6") _, out("xmm7") _, out("xmm8") _, out("xmm9") _, out("xmm10") _, out("xmm11") _,
                        out("xmm12") _, out("xmm13") _,
                        options(nomem, nostack),
                    );
                }
            }
        };
    }
    chains!(f32_512, "zmm", "vfmadd231ps");
    chains!(f32_256, "ymm", "vfmadd231ps");
    chains!(f16_512, "zmm", "vfmadd231ph");
    chains!(int8_512, "zmm", "vpdpbusd");
    chains!(int8_256, "ymm", "{{vex}} vpdpbusd");
    chains!(int8_maddubs_256, "ymm", "vpmaddubsw");

    fn rate(threads: usize, lanes: usize, run: unsafe fn()) -> f64 {
        // SAFETY: the callers below have checked the instruction set.
        let seconds = best(threads, |_| unsafe { run() });
        (threads * ROUNDS * CHAINS * lanes * 2) as f64 / seconds
    }

    pub(crate) fn f32(threads: usize) -> Option<f64> {
        if is_x86_feature_detected!("avx512f") {
            return Some(rate(threads, 16, f32_512));
        }
        let has = is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma");
        has.then(|| rate(threads, 8, f32_256))
    }

    pub(crate) fn f16(threads: usize) -> Option<f64> {
        is_x86_feature_detected!("avx512fp16").then(|| rate(threads, 32, f16_512))
    }

    /// Four products summed into 32 bits. Without such an instruction AVX2 multiplies pairs into 16 bits, which have to be
    /// widened (`vpmaddwd`) and added: three instructions for the same, so a third of its rate.
    pub(crate) fn int8(threads: usize) -> Option<f64> {
        if is_x86_feature_detected!("avx512vnni") {
            return Some(rate(threads, 64, int8_512));
        }
        if is_x86_feature_detected!("avxvnni") {
            return Some(rate(threads, 32, int8_256));
        }
        is_x86_feature_detected!("avx2").then(|| rate(threads, 32, int8_maddubs_256) / 3.0)
    }
}
