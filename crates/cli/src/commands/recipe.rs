//! `byol recipe`

use std::process::ExitCode;

use byol::train::recipe::{NAMES, RecipeOverrides, built_in};

use crate::terminal::{Result, out};

const EXAMPLES: &str = "\
Examples:
  byol recipe list                      List the built-in recipes
  byol recipe show cifar10 > mine.toml  Start a recipe file of your own";

/// List and print recipes
#[derive(Debug, clap::Args)]
#[command(after_long_help = EXAMPLES)]
pub struct Args {
    #[command(subcommand)]
    action: Action,
}

#[derive(Debug, clap::Subcommand)]
enum Action {
    /// List the built-in recipes
    List,
    /// Print a recipe as TOML, to edit and pass as `--recipe FILE.toml`
    Show {
        /// Built-in recipe, TOML file, or run
        recipe: String,
        /// Print all settings, with their default values
        #[arg(long)]
        all: bool,
    },
}

pub fn run(args: &Args) -> Result<ExitCode> {
    match &args.action {
        Action::List => {
            for name in NAMES {
                out!("{name:<15}{}", summary(name));
            }
        }
        Action::Show { recipe, .. } if recipe == "auto" => {
            let hint = "print the plan for your data with `byol pretrain DATA --dry-run`";
            return Err(format!("the recipe auto depends on the data and the machine\nhint: {hint}").into());
        }
        Action::Show { recipe, all } => match built_in(recipe) {
            Some(text) if !all => out!("{}", text.trim_end()),
            _ => out!("{}", RecipeOverrides::from_recipe(recipe)?.check()?.to_toml().trim_end()),
        },
    }
    Ok(ExitCode::SUCCESS)
}

/// Start of the comment at the head of a recipe.
fn summary(name: &str) -> String {
    let Some(text) = built_in(name) else { return "chosen for the data and the machine".into() };
    let comment: Vec<&str> = text.lines().map_while(|line| line.strip_prefix('#')).map(str::trim).collect();
    let comment = comment.join(" ");
    comment.split_once(": ").map_or(comment.as_str(), |(first, _)| first).to_owned()
}
