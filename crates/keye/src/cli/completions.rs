//! `keye completions`.

use anyhow::Result;
use clap::CommandFactory;
use clap_complete::Shell;

const AFTER_HELP: &str = "\
Examples:
  keye completions bash > ~/.local/share/bash-completion/completions/keye
  keye completions zsh > ~/.zfunc/_keye
  keye completions fish > ~/.config/fish/completions/keye.fish";

/// Print a shell's completion script
#[derive(clap::Args)]
#[command(after_help = AFTER_HELP)]
pub struct Args {
    /// Which shell
    shell: Shell,
}

pub fn run(args: Args) -> Result<()> {
    let mut script = Vec::new();
    clap_complete::generate(args.shell, &mut super::Cli::command(), "keye", &mut script);
    super::ui::out(&String::from_utf8_lossy(&script))
}
