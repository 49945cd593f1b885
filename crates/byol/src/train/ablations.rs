//! The paper's ablations (§5, tables 4 and 5, appendix F) as recipe changes: every run of a study
//! is a recipe that can also run alone.

use toml::Value;

/// A set of runs that vary one aspect.
#[derive(Debug, Clone)]
pub struct Study {
    /// Name, as in `--study`.
    pub name: &'static str,
    /// Varied aspect.
    pub title: &'static str,
    /// Result of the paper, in one sentence.
    pub paper: &'static str,
    /// Runs, in the order of the table.
    pub variants: Vec<Variant>,
}

/// One run of a study.
#[derive(Debug, Clone, PartialEq)]
pub struct Variant {
    /// Row of the table and position in the plot.
    pub name: String,
    /// Method, which is the curve of the plot.
    pub method: &'static str,
    /// Recipe keys with their values.
    pub set: Vec<(String, Value)>,
}

/// Method name of BYOL.
const BYOL: &str = "BYOL";

/// Method name of the contrastive baseline (SimCLR's loss).
const CONTRASTIVE: &str = "contrastive";

type Set = (&'static str, Value);

/// InfoNCE: no predictor, no target network, β = 1, SimCLR's temperature.
fn contrastive() -> Vec<Set> {
    vec![
        ("method.predictor", false.into()),
        ("method.stop_gradient", false.into()),
        ("method.beta", 1.0.into()),
        ("method.alpha", 0.1.into()),
    ]
}

fn variant(name: &str, method: &'static str, set: impl IntoIterator<Item = Set>) -> Variant {
    let set = set.into_iter().map(|(key, value)| (key.to_owned(), value)).collect();
    Variant { name: name.to_owned(), method, set }
}

/// One change for both methods.
fn both(name: &str, set: &[Set]) -> [Variant; 2] {
    let baseline = contrastive().into_iter().chain(set.iter().cloned());
    [variant(name, BYOL, set.iter().cloned()), variant(name, CONTRASTIVE, baseline)]
}

/// One value for both views.
fn views(field: [&'static str; 2], value: impl Into<Value> + Copy) -> [Set; 2] {
    field.map(|key| (key, value.into()))
}

/// All studies. `batch` is the recipe's batch size, which the batch-size study divides.
pub fn all(batch: usize) -> Vec<Study> {
    vec![batch_size(batch), augmentations(), target(), predictor(), beta()]
}

fn batch_size(batch: usize) -> Study {
    // Batch norm needs a few images.
    let parts = [1, 2, 4, 8, 16].into_iter().filter(|parts| batch.is_multiple_of(*parts) && batch / parts >= 4);
    let variants_of =
        |parts: usize| both(&format!("{}", batch / parts), &[("train.accumulate", (parts as i64).into())]);
    Study {
        name: "batch-size",
        title: "batch size (gradients averaged over the micro-batches of a full batch)",
        paper: "at 1/16 of the batch size BYOL loses 0.7 points, the contrastive baseline 3.6 (fig. 3a)",
        variants: parts.flat_map(variants_of).collect(),
    }
}

fn augmentations() -> Study {
    let jitter = views(["views.first.jitter", "views.second.jitter"], 0.0);
    let gray = views(["views.first.gray", "views.second.gray"], 0.0);
    let blur = views(["views.first.blur", "views.second.blur"], 0.0);
    let solarize = views(["views.first.solarize", "views.second.solarize"], 0.0);
    let flip = views(["views.first.flip", "views.second.flip"], 0.0);
    let color = [jitter, gray.clone()].concat();
    Study {
        name: "views",
        title: "removed augmentations",
        paper: "without color augmentations BYOL loses 9.1 points, the contrastive baseline 22.2; with crops only 13.1 and 27.6 (fig. 3b)",
        variants: [
            both("all", &[]),
            both("no gray", &gray),
            both("no blur", &blur),
            both("no color", &color),
            both("crop only", &[color.clone(), blur.to_vec(), solarize.to_vec(), flip.to_vec()].concat()),
        ]
        .concat(),
    }
}

fn target() -> Study {
    let constant = |name: &str, tau: f64| {
        variant(name, BYOL, [("target.tau", tau.into()), ("target.schedule", "constant".into())])
    };
    Study {
        name: "target",
        title: "target decay τ",
        paper: "a fixed target gives 18.8 %, the online network as target 0.3 %, τ = 0.99 the best, 72.5 % (table 5a)",
        variants: vec![
            // The paper's fixed target is a random network of its own, not the initial online
            // network.
            variant(
                "1 (never updated)",
                BYOL,
                [
                    ("target.tau", 1.0.into()),
                    ("target.schedule", "constant".into()),
                    ("target.init", "independent".into()),
                ],
            ),
            constant("0.999", 0.999),
            constant("0.99", 0.99),
            constant("0.9", 0.9),
            constant("0 (online network)", 0.0),
            variant("rising to 1", BYOL, []),
        ],
    }
}

/// Eight rows of table 5b: predictor, target network, negatives.
fn predictor() -> Study {
    let variant_of = |beta: f64, predictor: bool, target: bool| {
        let yes = |yes: bool| if yes { "yes" } else { "no" };
        let name = format!("q {}, target {}, β {beta}", yes(predictor), yes(target));
        let set = [
            ("method.predictor", predictor.into()),
            ("method.stop_gradient", target.into()),
            ("method.beta", beta.into()),
        ];
        variant(&name, if beta == 0.0 { BYOL } else { CONTRASTIVE }, set)
    };
    let pairs = [(true, true), (false, true), (true, false), (false, false)];
    Study {
        name: "predictor",
        title: "predictor q, target network, negatives",
        paper: "BYOL without q or without the target network collapses (below 0.3 %); with negatives nothing collapses (table 5b)",
        variants: [0.0, 1.0]
            .into_iter()
            .flat_map(|beta| pairs.map(|(q, target)| variant_of(beta, q, target)))
            .collect(),
    }
}

fn beta() -> Study {
    let variant_of = |beta: f64| variant(&format!("{beta}"), BYOL, [("method.beta", beta.into())]);
    Study {
        name: "beta",
        title: "weight β of the negatives, and SimCLR",
        paper: "negatives do not help BYOL: 72.5 % with β = 0, 70.9 % with β = 1, 69.4 % for SimCLR (table 5b)",
        variants: [0.0, 0.1, 0.3, 0.5, 1.0]
            .into_iter()
            .map(variant_of)
            .chain([variant("SimCLR", CONTRASTIVE, contrastive())])
            .collect(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::train::recipe::{Recipe, RecipeOverrides};

    #[test]
    fn every_variant_is_a_valid_recipe() {
        for study in all(64) {
            assert!(study.variants.len() >= 5, "{}", study.name);
            for variant in &study.variants {
                let mut overrides = RecipeOverrides::from_recipe("cifar10").unwrap();
                overrides.set("train.batch=64").unwrap();
                for (key, value) in &variant.set {
                    overrides.insert(key, value.clone(), study.name).unwrap();
                }
                let recipe = overrides.apply_to(&Recipe::default());
                assert!(recipe.is_ok(), "{}: {}: {recipe:?}", study.name, variant.name);
            }
        }
    }
}
