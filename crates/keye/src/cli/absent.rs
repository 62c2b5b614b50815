//! Commands of builds without the feature that they need: they say how to build.

/// For builds with another feature
#[derive(clap::Args)]
pub struct Args {
    /// Whatever was meant for such a build
    #[arg(trailing_var_arg = true, allow_hyphen_values = true, hide = true)]
    _options: Vec<String>,
}

/// `keye gpu-check` without CUDA.
#[cfg(not(feature = "cuda"))]
pub mod gpu_check {
    pub use super::Args;

    pub fn run(_: &Args) -> anyhow::Result<()> {
        anyhow::bail!("this build has no CUDA, so there is no GPU to check: build with --features cuda")
    }
}

/// `keye world` without Parquet.
#[cfg(not(feature = "parquet"))]
pub mod world {
    pub use super::Args;

    pub fn run(_: Args) -> anyhow::Result<()> {
        anyhow::bail!("this build writes no Parquet files: build with --features parquet")
    }
}
