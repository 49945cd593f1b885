//! The paper's ablations (§5, tables 4 and 5, appendix F) as changes of a recipe: every run of a study is a recipe that anyone can run alone.

use toml::Value;

/// A question and the runs that answer it.
#[derive(Debug, Clone)]
pub struct Study {
    /// As `--study` names it.
    pub name: &'static str,
    /// What is varied.
    pub title: &'static str,
    /// What the paper found, in a sentence.
    pub paper: &'static str,
    /// The runs, in the order of the table.
    pub variants: Vec<Variant>,
}

/// One run of a study.
#[derive(Debug, Clone, PartialEq)]
pub struct Variant {
    /// Row of the table and column of the plot.
    pub name: String,
    /// Curve of the plot: the method.
    pub method: &'static str,
    /// Recipe keys and their values.
    pub set: Vec<(String, Value)>,
}

/// BYOL, as rows and plots call it.
const BYOL: &str = "BYOL";

/// The contrastive baseline: SimCLR's loss, by the same program.
const CONTRASTIVE: &str = "contrastive";

type Set = (&'static str, Value);

/// No predictor, no target, β = 1 with SimCLR's temperature: InfoNCE.
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

/// The same change for both methods.
fn both(name: &str, set: &[Set]) -> [Variant; 2] {
    let baseline = contrastive().into_iter().chain(set.iter().cloned());
    [variant(name, BYOL, set.iter().cloned()), variant(name, CONTRASTIVE, baseline)]
}

/// The same value for both views.
fn views(field: [&'static str; 2], value: impl Into<Value> + Copy) -> [Set; 2] {
    field.map(|key| (key, value.into()))
}

/// All studies. `batch` is the recipe's batch, which the study of batch sizes divides.
pub fn all(batch: usize) -> Vec<Study> {
    vec![batch_size(batch), augmentations(), target(), predictor(), beta()]
}

fn batch_size(batch: usize) -> Study {
    // Batch norm wants a few images.
    let parts = [1, 2, 4, 8, 16].into_iter().filter(|parts| batch.is_multiple_of(*parts) && batch / parts >= 4);
    let of = |parts: usize| both(&format!("{}", batch / parts), &[("train.accumulate", (parts as i64).into())]);
    Study {
        name: "batch-size",
        title: "images in a batch (gradients averaged over as many batches as the full one has)",
        paper: "at a sixteenth of the batch BYOL has lost 0.7 points, the contrastive baseline 3.6 (fig. 3a)",
        variants: parts.flat_map(of).collect(),
    }
}

fn augmentations() -> Study {
    let jitter = views(["views.first.jitter", "views.second.jitter"], 0.0);
    let grey = views(["views.first.grey", "views.second.grey"], 0.0);
    let blur = views(["views.first.blur", "views.second.blur"], 0.0);
    let solarize = views(["views.first.solarize", "views.second.solarize"], 0.0);
    let flip = views(["views.first.flip", "views.second.flip"], 0.0);
    let colour = [jitter, grey.clone()].concat();
    Study {
        name: "views",
        title: "augmentations left out",
        paper: "without colour changes BYOL loses 9.1 points, the contrastive baseline 22.2; with crops alone 13.1 and 27.6 (fig. 3b)",
        variants: [
            both("all", &[]),
            both("no grey", &grey),
            both("no blur", &blur),
            both("no colour", &colour),
            both("crop only", &[colour.clone(), blur.to_vec(), solarize.to_vec(), flip.to_vec()].concat()),
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
        title: "decay of the target network",
        paper: "a target that is never updated gives 18.8 %, one that is the online network 0.3 %, 0.99 the best, 72.5 % (table 5a)",
        variants: vec![
            // The paper's target that stays is a network of its own, not the one that the online network begins as.
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

/// The eight rows of the paper's table: predictor, target, negatives.
fn predictor() -> Study {
    let of = |beta: f64, predictor: bool, target: bool| {
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
        title: "with and without predictor q, target network, negatives",
        paper: "BYOL without q or without the target network collapses (below 0.3 %); with negatives nothing does (table 5b)",
        variants: [0.0, 1.0].into_iter().flat_map(|beta| pairs.map(|(q, target)| of(beta, q, target))).collect(),
    }
}

fn beta() -> Study {
    let of = |beta: f64| variant(&format!("{beta}"), BYOL, [("method.beta", beta.into())]);
    Study {
        name: "beta",
        title: "weight β of the negatives, with predictor and target; and SimCLR",
        paper: "negatives do not help BYOL: 72.5 % with β = 0, 70.9 % with β = 1, 69.4 % for SimCLR (table 5b)",
        variants: [0.0, 0.1, 0.3, 0.5, 1.0]
            .into_iter()
            .map(of)
            .chain([variant("SimCLR", CONTRASTIVE, contrastive())])
            .collect(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::train::recipe::{Draft, Recipe};

    #[test]
    fn every_run_of_every_study_is_a_valid_recipe() {
        for study in all(64) {
            assert!(study.variants.len() >= 5, "{}", study.name);
            for variant in &study.variants {
                let mut draft = Draft::from_recipe("cifar10").unwrap();
                draft.set("train.batch=64").unwrap();
                for (key, value) in &variant.set {
                    draft.say(key, value.clone(), study.name).unwrap();
                }
                let recipe = draft.over(&Recipe::default());
                assert!(recipe.is_ok(), "{}: {}: {recipe:?}", study.name, variant.name);
            }
        }
    }
}
