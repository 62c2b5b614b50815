//! `keye world` of builds without Parquet, as builds are unless told otherwise.

use anyhow::{Result, bail};

/// Write synthetic clips and their records: for builds with Parquet
#[derive(clap::Args)]
pub struct Args {
    /// Whatever was meant for such a build
    #[arg(trailing_var_arg = true, allow_hyphen_values = true, hide = true)]
    _options: Vec<String>,
}

pub fn run(_: Args) -> Result<()> {
    bail!("this build writes no Parquet files: build with --features parquet")
}
