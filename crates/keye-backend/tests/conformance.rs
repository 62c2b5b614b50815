//! Every backend of this machine against the reference.

use keye_backend::{Backend, Cpu, CpuOptions, Isa, Reference, conformance};

/// Compares the backend with the reference; says what was compared.
fn check<B: Backend>(backend: &B, tolerance: f32) -> Vec<String> {
    let mut checks = conformance::run(backend, tolerance).unwrap();
    checks.extend(conformance::run_latent(backend, tolerance).unwrap());
    assert!(checks.len() > 100, "{} checks", checks.len());
    let failed: Vec<_> = checks.iter().filter(|check| !check.passed()).collect();
    assert!(failed.is_empty(), "{}: {failed:#?}", backend.describe());
    checks.into_iter().map(|check| check.name).collect()
}

/// And it defines every operation, those that a device may do without among them.
#[test]
fn reference_agrees_with_itself() {
    let names = check(&Reference, 0.0);
    assert_eq!(names.iter().filter(|name| name.starts_with("highest ")).count(), 6, "rows are cut");
}

#[test]
fn every_instruction_set_agrees_with_the_reference() {
    for isa in Isa::available() {
        for threads in [1, 3] {
            check(&Cpu::new(CpuOptions { threads: Some(threads), isa: Some(isa) }).unwrap(), 2e-5);
        }
    }
}

#[test]
fn the_suite_notices_a_wrong_result() {
    // Nothing agrees to the last bit with another order of summation.
    let cpu = Cpu::new(CpuOptions { threads: Some(1), isa: None }).unwrap();
    assert!(conformance::run(&cpu, 0.0).unwrap().iter().any(|check| !check.passed()));
}

#[cfg(feature = "cuda-emulator")]
#[test]
fn cuda_kernels_agree_with_the_reference() {
    use keye_backend::{Cuda, Products};
    // Queries and keys of the suite are large: rounded to bf16 a score is off by some hundredths, and so are weights.
    for (products, tolerance) in [(Products::F32, 2e-5), (Products::Bf16, 0.15)] {
        let Some(cuda) = Cuda::for_tests(products) else { return };
        let mut checks = conformance::run(&cuda, tolerance).unwrap();
        checks.extend(conformance::run_fp8(&cuda, tolerance).unwrap());
        assert!(checks.len() > 100, "{} checks", checks.len());
        let failed: Vec<_> = checks.iter().filter(|check| !check.passed()).collect();
        assert!(failed.is_empty(), "{}: {failed:#?}", cuda.describe());
    }
}

/// Every kernel once or twice, each load and store looked at. Values are the other test's business.
#[cfg(feature = "cuda-emulator")]
#[test]
fn cuda_kernels_do_not_race() {
    use keye_backend::{Cuda, Products};
    for (products, tolerance) in [(Products::F32, 1e-4), (Products::Bf16, 0.15)] {
        let Some(cuda) = Cuda::watched(products) else { return };
        let checks = conformance::run_small(&cuda, tolerance).unwrap();
        let failed: Vec<_> = checks.iter().filter(|check| !check.passed()).collect();
        assert!(failed.is_empty(), "{}: {failed:#?}", cuda.describe());
    }
}

#[cfg(feature = "cuda-emulator")]
#[test]
fn cuda_training_agrees_with_plain_formulas() {
    use keye_backend::{Cuda, Products, conformance::training};
    let Some(cuda) = Cuda::for_tests(Products::F32) else { return };
    let checks = training::run(&cuda, 2e-5).unwrap();
    assert!(checks.len() > 200, "{} checks", checks.len());
    let failed: Vec<_> = checks.iter().filter(|check| !check.passed()).collect();
    assert!(failed.is_empty(), "{}: {failed:#?}", cuda.describe());
    // Nothing agrees to the last bit with f64.
    let checks = training::run_small(&cuda, 0.0).unwrap();
    let wrong = |part: &str| checks.iter().any(|check| check.name.contains(part) && !check.passed());
    for part in ["add_column_sums", "RMSNorm", "LayerNorm", "heads", "silu_mul", "gelu", "softmax_loss", "adamw"] {
        assert!(wrong(part), "{part}");
    }
}

/// Every kernel of training, each load and store looked at.
#[cfg(feature = "cuda-emulator")]
#[test]
fn cuda_training_does_not_race() {
    use keye_backend::{Cuda, Products, conformance::training};
    let Some(cuda) = Cuda::watched(Products::F32) else { return };
    let failed: Vec<_> =
        training::run_small(&cuda, 1e-4).unwrap().into_iter().filter(|check| !check.passed()).collect();
    assert!(failed.is_empty(), "{failed:#?}");
}

/// Indices beyond an array are refused before anything is launched.
#[cfg(feature = "cuda-emulator")]
#[test]
fn cuda_training_stays_inside_arrays() {
    use keye_backend::training::{Device, Taps, View, ViewMut};
    use keye_backend::{Cuda, Products};
    use std::panic::{AssertUnwindSafe, catch_unwind};
    let Some(cuda) = Cuda::for_tests(Products::F32) else { return };
    let device = &cuda;
    let array = || Device::zeros(device, 6).unwrap();
    let refused = |what: &str, f: &dyn Fn()| assert!(catch_unwind(AssertUnwindSafe(f)).is_err(), "{what}");
    refused("a view", &|| drop(Device::values(device, View { array: &array(), start: 1, rows: 2, cols: 3 })));
    refused("gather", &|| drop(device.gather(View::of(&array(), 3, 2), &[0, 3])));
    refused("scatter", &|| drop(device.scatter(ViewMut::of(&mut array(), 1, 6), &[1], &array())));
    refused("scatter twice", &|| drop(device.scatter(ViewMut::of(&mut array(), 6, 1), &[0, 1, 2, 3, 4, 1], &array())));
    let taps = Taps::new(3, [(0, 3, 1.0)].into_iter());
    refused("taps", &|| drop(device.add_taps(ViewMut::of(&mut array(), 3, 2), View::of(&array(), 3, 2), &taps)));
    refused("a token", &|| drop(device.softmax_loss(&mut array(), &[(0, 1.0), (3, 1.0)])));
}
