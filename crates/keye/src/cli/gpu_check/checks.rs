//! Operations against the reference.

use std::time::Instant;

use anyhow::Result;
use keye_backend::conformance::{self, Check};
use keye_backend::cuda::nvrtc::{self, Nvrtc};
use keye_backend::{Activation, Backend, BackendError, Cuda, CudaOptions, Dtype, Products, WeightSource};

use super::report::{Checked, DeviceFound};

/// Largest differences from the reference, of the whole suite and of the small one, whose sums happen to cancel more. Queries and
/// keys are large: rounded to bf16 a score is off by some hundredths, and so are weights.
const TOLERANCES: [(Products, [f32; 2]); 2] = [(Products::F32, [2e-5, 1e-4]), (Products::Bf16, [0.15, 0.15])];

/// Largest difference of training's operations. Single values are among them, of which a GELU's far from zero is a small difference.
const TRAINING_TOLERANCE: f32 = 2e-4;

/// Which GPU, or the kernels on the CPU.
#[derive(Debug, Clone, Copy)]
pub struct Device {
    pub number: usize,
    pub emulated: bool,
}

impl Device {
    fn open(self, products: Products, library: bool, waiting: bool) -> Result<Cuda, BackendError> {
        #[cfg(feature = "cuda-emulator")]
        if self.emulated {
            let reason = "needs g++ and x86-64".into();
            return Cuda::emulated(products).ok_or(BackendError::Device { what: "the emulator".into(), reason });
        }
        Cuda::new(CudaOptions { device: self.number, products, library, waiting })
    }
}

/// What there is.
pub fn look(device: Device) -> Result<DeviceFound> {
    let begin = Instant::now();
    let cuda = device.open(Products::default(), false, false)?;
    let start = begin.elapsed().as_secs_f64();
    let compiler = match Nvrtc::open().and_then(|nvrtc| nvrtc.version()) {
        Ok((major, minor)) => format!("NVRTC {major}.{minor}"),
        Err(reason) => format!("no NVRTC ({reason})"),
    };
    let library = match device.open(Products::default(), true, false) {
        _ if device.emulated => "not on the CPU".into(),
        Ok(_) => "found".into(),
        Err(error) => format!("not used: {}", of_library(&error)),
    };
    Ok(DeviceFound {
        name: cuda.describe(),
        memory: cuda.memory()?,
        start,
        compiler: format!("{} carried by the program, {compiler}", nvrtc::embedded().count()),
        library,
    })
}

/// The conformance suite in both modes of products; small: every operation in a few shapes, each launch waited for.
pub fn suite(device: Device, small: bool, add: &mut dyn FnMut(Checked) -> Result<()>) -> Result<()> {
    for (products, tolerances) in TOLERANCES {
        let tolerance = tolerances[usize::from(small)];
        let cuda = device.open(products, false, small)?;
        let begin = Instant::now();
        let checks = match small {
            true => conformance::run_small(&cuda, tolerance)?,
            false => {
                let mut checks = conformance::run(&cuda, tolerance)?;
                checks.extend(conformance::run_fp8(&cuda, tolerance)?);
                checks
            }
        };
        let mode = match products {
            Products::F32 => "f32",
            Products::Bf16 => "bf16",
        };
        let size = if small { "small operations" } else { "operations" };
        add(checked(format!("{size}, products in {mode}"), &checks, begin))?;
    }
    Ok(())
}

/// The operations of training, each launch waited for.
pub fn training(device: Device, add: &mut dyn FnMut(Checked) -> Result<()>) -> Result<()> {
    let cuda = device.open(Products::F32, false, true)?;
    let begin = Instant::now();
    let checks = conformance::training::run(&cuda, TRAINING_TOLERANCE)?;
    add(checked("operations of training".into(), &checks, begin))
}

fn checked(name: String, checks: &[Check], begin: Instant) -> Checked {
    let failed = checks.iter().filter(|check| !check.passed());
    let failed = failed.map(|check| format!("{}: {:.2e} > {:.1e}", check.name, check.error, check.tolerance)).collect();
    Checked { name, count: checks.len(), failed, differs: Vec::new(), seconds: begin.elapsed().as_secs_f64() }
}

/// An error behind the library's name.
fn of_library(error: &BackendError) -> String {
    let text = error.to_string();
    text.strip_prefix("cuBLASLt: ").unwrap_or(&text).to_owned()
}

/// cuBLASLt's products beside our own, which the suite has checked; or why there are none.
pub fn library(device: Device) -> Result<Result<Checked, String>> {
    if device.emulated {
        return Ok(Err("the kernels are on the CPU, where there is none".into()));
    }
    let own = device.open(Products::Bf16, false, true)?;
    let library = match device.open(Products::Bf16, true, true) {
        Ok(library) => library,
        Err(error) => return Ok(Err(of_library(&error))),
    };
    let begin = Instant::now();
    let (rows, cols, outputs) = (200, 588, 320);
    let value = |i: usize| ((i.wrapping_mul(2_654_435_761) >> 9) % 2003) as f32 * 1e-3 - 1.0;
    let values: Vec<f32> = (0..outputs * cols).map(|i| value(i) * 0.1).collect();
    let halves = values.iter().flat_map(|v| ((v.to_bits() >> 16) as u16).to_le_bytes()).collect::<Vec<u8>>();
    let weight = WeightSource::from_f32("weight", outputs, cols, &values);
    let weight = WeightSource { dtype: Dtype::Bf16, bytes: halves.into(), ..weight };
    let bias = WeightSource::from_f32("bias", 1, outputs, &vec![0.5; outputs]);
    let results = [&own, &library].map(|b| -> Result<[Vec<f32>; 3], BackendError> {
        let x = b.upload(rows, cols, &(0..rows * cols).map(value).collect::<Vec<_>>())?;
        let (weight, bias) = (b.load(&weight)?, b.load(&bias)?);
        let mut y = b.linear(&x, &weight, None, Activation::None)?;
        b.linear_add(&x, &weight, None, &mut y)?;
        let activated = b.linear(&x, &weight, Some(&bias), Activation::GeluTanh)?;
        let gated = b.gated(&x, &weight, &weight)?;
        Ok([b.download(&y)?, b.download(&activated)?, b.download(&gated)?])
    });
    let [own, library] = results;
    let (own, library) = (own?, library?);
    let compare = |(name, (own, library)): (&str, (&Vec<f32>, &Vec<f32>))| {
        let size = own.iter().fold(1e-3f32, |size, v| size.max(v.abs()));
        let error = own.iter().zip(library).fold(0.0f32, |error, (a, b)| match (a - b).abs() {
            difference if difference.is_nan() => f32::INFINITY,
            difference => error.max(difference / size),
        });
        Check { name: name.into(), error, tolerance: 1e-4 }
    };
    let names = ["product and sum", "bias and activation", "gated"];
    let checks: Vec<Check> = names.into_iter().zip(own.iter().zip(&library)).map(compare).collect();
    Ok(Ok(checked("cuBLASLt beside our own products".into(), &checks, begin)))
}
