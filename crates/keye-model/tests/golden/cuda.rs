//! The golden data on CUDA's kernels: on a GPU, or else compiled for the CPU. With KEYE_GPU=1 there has to be a GPU.

use keye_backend::{Backend, Cuda, CudaOptions, Products};

use crate::{cases, invariance, keye_2};

fn cuda(products: Products) -> Option<Cuda> {
    let found = match Cuda::new(CudaOptions { products, ..CudaOptions::default() }) {
        Ok(gpu) => Some(gpu),
        Err(error) if std::env::var_os("KEYE_GPU").is_some_and(|wanted| wanted == "1") => {
            panic!("KEYE_GPU=1 asks for a GPU: {error}");
        }
        Err(error) => {
            eprintln!("no GPU: {error}");
            Cuda::emulated(products)
        }
    };
    match &found {
        Some(cuda) => eprintln!("{}", cuda.describe()),
        None => eprintln!("skipped: neither a GPU nor a g++ to compile the kernels for the CPU with"),
    }
    found
}

#[test]
fn cuda_reproduces_every_case() {
    let Some(cuda) = cuda(Products::F32) else { return };
    cases::check(|| cuda.clone());
}

#[test]
fn second_generation_on_cuda() {
    let Some(cuda) = cuda(Products::F32) else { return };
    keye_2::check(|| cuda.clone());
}

/// Bit for bit also where queries, keys and weights are rounded for the matrix cores.
#[test]
fn cuda_is_row_invariant() {
    for products in [Products::F32, Products::Bf16] {
        let Some(cuda) = cuda(products) else { return };
        invariance::chunked(cuda.clone());
        invariance::highest(cuda);
    }
}
