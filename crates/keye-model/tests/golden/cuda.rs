//! The golden data on CUDA's kernels: on a GPU, or else compiled for the CPU. With KEYE_GPU=1 there has to be a GPU.

use keye_backend::{Cuda, Products};

use crate::{cases, invariance, keye_2};

#[test]
fn cuda_reproduces_every_case() {
    let Some(cuda) = Cuda::for_tests(Products::F32) else { return };
    cases::check(|| cuda.clone());
}

#[test]
fn second_generation_on_cuda() {
    let Some(cuda) = Cuda::for_tests(Products::F32) else { return };
    keye_2::check(|| cuda.clone());
}

/// Bit for bit also where queries, keys and weights are rounded for the matrix cores.
#[test]
fn cuda_is_row_invariant() {
    for products in [Products::F32, Products::Bf16] {
        let Some(cuda) = Cuda::for_tests(products) else { return };
        invariance::chunked(cuda.clone());
        invariance::highest(cuda, true);
    }
}
