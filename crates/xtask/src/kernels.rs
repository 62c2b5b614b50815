//! Compiles all CUDA kernels without a GPU or a toolkit: NVRTC comes as a wheel from PyPI, known by its hash.

use std::path::{Path, PathBuf};
use std::process::Command;

/// The wheel, and what pip is asked for; it refuses anything else.
const NAME: &str = "nvidia-cuda-nvrtc-cu12==12.9.86";
const SHA256: &str = "210cf05005a447e29214e9ce50851e83fc5f4358df8b453155d5e1918094dcb4";

/// Where the library lies in the wheel.
const LIBRARY: &str = "nvidia/cuda_nvrtc/lib";

const USAGE: &str = "usage: xtask kernels [--embed] [sm_80 sm_89 sm_90a ...]";

/// Compiles for some chips (all that are released for), prints registers, fails on spills. With `--embed` builds with the
/// feature `cuda` carry the machine code from then on; otherwise it goes to `target/kernels`.
pub fn check(root: &Path, args: &[String]) -> Result<Vec<String>, String> {
    let (options, chips): (Vec<&String>, Vec<&String>) = args.iter().partition(|arg| arg.starts_with('-'));
    let embed = match &options[..] {
        [] => false,
        [option] if *option == "--embed" => true,
        _ => return Err(USAGE.into()),
    };
    let folder = root.join("target").join("kernels");
    let library = nvrtc(&folder)?;
    let out = if embed { root.join("crates/keye-backend/cubins") } else { folder.join("cubins") };
    // The example is built before: what it carries itself does not matter.
    let status = Command::new(env!("CARGO"))
        .args(["run", "--release", "--locked", "-q", "-p", "keye-backend", "--features", "cuda"])
        .args(["--example", "cuda_kernels", "--", "--out"])
        .arg(&out)
        .args(&chips)
        .current_dir(root)
        .env("LD_LIBRARY_PATH", library)
        .status()
        .map_err(|e| format!("cargo: {e}"))?;
    if !status.success() {
        return Ok(vec!["kernels do not compile, or spill".into()]);
    }
    println!("machine code in {}", out.display());
    Ok(Vec::new())
}

/// The folder of the library, fetched when it is not there yet.
fn nvrtc(folder: &Path) -> Result<PathBuf, String> {
    let wheel = folder.join("wheel");
    let library = wheel.join(LIBRARY);
    if library.is_dir() {
        return Ok(library);
    }
    std::fs::create_dir_all(folder).map_err(|e| format!("{}: {e}", folder.display()))?;
    let requirements = folder.join("requirements.txt");
    let line = format!("{NAME} --hash=sha256:{SHA256}\n");
    std::fs::write(&requirements, line).map_err(|e| format!("{}: {e}", requirements.display()))?;
    // To a folder beside, so that half a wheel is never taken for one.
    let part = folder.join("part");
    let _ = std::fs::remove_dir_all(&part);
    let mut pip = Command::new("python3");
    pip.args(["-m", "pip", "install", "-q", "--no-deps", "--only-binary=:all:", "--require-hashes", "--target"]);
    crate::output(pip.arg(&part).arg("-r").arg(&requirements)).map_err(|error| {
        format!(
            "NVRTC could not be fetched ({}). It needs python3 with pip and PyPI; or unpack the wheel {NAME} for x86-64 \
             Linux (sha256 {SHA256}) to {}",
            error.trim(),
            wheel.display()
        )
    })?;
    std::fs::rename(&part, &wheel).map_err(|e| format!("{}: {e}", wheel.display()))?;
    match library.is_dir() {
        true => Ok(library),
        false => Err(format!("{}: not in the wheel", library.display())),
    }
}
