//! Compiles all CUDA kernels with NVRTC, prints their registers and fails on spills. Needs no GPU.
//!
//! `cargo run --release -p keye-backend --features cuda --example cuda_kernels -- [--out DIR] [sm_80 sm_89 sm_90a ...]`
//!
//! With `--out` the machine code is written there. `cargo run --release -p xtask -- kernels` fetches NVRTC first; with `--embed`
//! it goes where the build takes it from.

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Instant;

use keye_backend::cuda::kernels::{MODULES, Module};
use keye_backend::cuda::nvrtc::{Compiled, Nvrtc, file_name};
use rayon::prelude::*;

fn main() -> ExitCode {
    match run() {
        Ok(0) => ExitCode::SUCCESS,
        Ok(spilling) => {
            eprintln!("{spilling} kernels spill");
            ExitCode::FAILURE
        }
        Err(error) => {
            eprintln!("{error}");
            ExitCode::FAILURE
        }
    }
}

/// The number of kernels that spill.
fn run() -> Result<usize, String> {
    let (mut out, mut chips): (Option<PathBuf>, Vec<String>) = (None, Vec::new());
    let mut args = std::env::args().skip(1);
    while let Some(arg) = args.next() {
        match arg.as_str() {
            "--out" => out = Some(args.next().ok_or("--out: a folder is expected")?.into()),
            chip if chip.starts_with("sm_") => chips.push(arg),
            other => return Err(format!("{other}: expected --out DIR or architectures such as sm_90a")),
        }
    }
    if chips.is_empty() {
        chips = ["sm_80", "sm_89", "sm_90a"].map(String::from).to_vec();
    }
    if let Some(folder) = &out {
        std::fs::create_dir_all(folder).map_err(|e| format!("{}: {e}", folder.display()))?;
        // Those of other sources would be carried along for nothing.
        let files = std::fs::read_dir(folder).map_err(|e| format!("{}: {e}", folder.display()))?;
        for file in files.flatten().map(|entry| entry.path()) {
            if file.extension().is_some_and(|extension| extension == "cubin") {
                std::fs::remove_file(&file).map_err(|e| format!("{}: {e}", file.display()))?;
            }
        }
    }
    let nvrtc = Nvrtc::open()?;
    let (major, minor) = nvrtc.version()?;
    println!("NVRTC {major}.{minor}");
    let jobs: Vec<(&String, Module)> = chips.iter().flat_map(|chip| MODULES.map(|module| (chip, module))).collect();
    let compile = |(chip, module): &(&String, Module)| {
        let start = Instant::now();
        Ok((nvrtc.compile(module, chip)?, start.elapsed().as_secs_f64()))
    };
    let results: Vec<Result<(Compiled, f64), String>> = jobs.par_iter().with_max_len(1).map(compile).collect();
    let mut spilling = 0;
    for ((chip, module), result) in jobs.iter().zip(results) {
        let (compiled, seconds) = result?;
        println!("{chip} {}.cu: {} bytes, {seconds:.1} s", module.name, compiled.cubin.len());
        let resources = compiled.resources();
        if resources.len() != module.kernels().len() {
            return Err(format!("{} kernels in the source, {} in the log", module.kernels().len(), resources.len()));
        }
        for kernel in resources {
            let note = match (kernel.stack, kernel.spills) {
                (0, 0) => String::new(),
                (stack, spills) => format!("  {stack} bytes of stack, {spills} of spills"),
            };
            spilling += usize::from(!note.is_empty());
            println!("  {:28} {:3} registers{note}", kernel.kernel, kernel.registers);
        }
        if let Some(folder) = &out {
            let file = folder.join(file_name(module, chip));
            std::fs::write(&file, &compiled.cubin).map_err(|e| format!("{}: {e}", file.display()))?;
        }
    }
    Ok(spilling)
}
