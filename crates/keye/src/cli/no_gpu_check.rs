//! `keye gpu-check` of builds without CUDA.

use anyhow::{Result, bail};

/// Check an NVIDIA GPU: for builds with CUDA
#[derive(clap::Args)]
pub struct Args {
    /// Whatever was meant for such a build
    #[arg(trailing_var_arg = true, allow_hyphen_values = true, hide = true)]
    _options: Vec<String>,
}

pub fn run(_: &Args) -> Result<()> {
    bail!("this build has no CUDA, so there is no GPU to check: build with --features cuda")
}
