//! `byol completions SHELL`

use std::process::ExitCode;

use clap::CommandFactory;
use clap_complete::Shell;

use crate::terminal::{Result, out};

const EXAMPLES: &str = "\
Examples:
  byol completions bash > ~/.local/share/bash-completion/completions/byol  For bash
  byol completions zsh > ~/.zfunc/_byol                                    For zsh";

/// Print a shell completion script
#[derive(Debug, clap::Args)]
#[command(after_long_help = EXAMPLES)]
pub struct Args {
    /// Shell of the script
    shell: Shell,
}

pub fn run(args: &Args) -> Result<ExitCode> {
    let mut script = Vec::new();
    clap_complete::generate(args.shell, &mut super::Cli::command(), "byol", &mut script);
    out!("{}", String::from_utf8(script)?.trim_end());
    Ok(ExitCode::SUCCESS)
}
