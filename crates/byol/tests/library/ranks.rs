//! Data-parallel training matches a single rank: the same batches, batch-norm statistics over all
//! ranks, mean gradients. The ranks are threads here; `cli/tests/cli/mpi.rs` tests processes.

use std::{path::Path, sync::atomic::AtomicBool, thread};

use burn::tensor::Device;
use byol::{
    data::synthetic,
    nn::weights,
    ranks::{Ranks, threads},
    train::{Error, Event, Outcome, Plan, PrepareOptions, Recipe, RecipeOverrides, Run, RunContext, TrainingData},
};

fn data() -> TrainingData {
    let options = PrepareOptions { cache_bytes: 1 << 30, ..PrepareOptions::default() };
    TrainingData::prepare(synthetic::dataset(3, 48, 16), options, &|_| ()).unwrap()
}

fn plan(data: &TrainingData, more: &[&str]) -> Plan {
    let mut overrides = RecipeOverrides::from_recipe("auto").unwrap();
    let settings = [
        "encoder.architecture=resnet18",
        "encoder.width=0.125",
        "views.size=16",
        "heads.hidden=32",
        "heads.projection=16",
        "train.batch=16",
        "train.epochs=2",
        "train.warmup_epochs=0",
        "health.images=8",
        "optimizer.kind=sgd",
        // Rounding depends on the number of ranks, and on a GPU on the run. With large steps on so
        // few images it would grow to 1e-3.
        "optimizer.lr=0.002",
        "views.placement=cpu",
    ];
    settings.iter().chain(more).for_each(|s| overrides.set(s).unwrap());
    Plan::new("test", overrides.apply_to(&Recipe::default()).unwrap(), data, "cpu").unwrap()
}

/// Runs `work` on `n` ranks; returns the results in rank order.
fn on_ranks<T: Send>(n: usize, work: impl Fn(Ranks) -> T + Sync) -> Vec<T> {
    if n == 1 {
        return vec![work(Ranks::SINGLE)];
    }
    thread::scope(|scope| {
        let start = |rank: threads::Thread| {
            let work = &work;
            scope.spawn(move || work(Ranks::new(Box::leak(Box::new(rank)))))
        };
        let started: Vec<_> = threads::ranks(n).into_iter().map(start).collect();
        started.into_iter().map(|t| t.join().unwrap()).collect()
    })
}

fn context(ranks: Ranks) -> RunContext {
    RunContext { ranks, ..RunContext::single_process(crate::common::device(), 1) }
}

/// Trains a run on `n` ranks until step `until`, resuming if the folder has one. Returns the
/// losses.
fn train(folder: &Path, n: usize, plan: &Plan, data: &TrainingData, until: u64) -> Vec<f64> {
    let all = on_ranks(n, |ranks| {
        let mut run = match folder.join("plan.toml").exists() {
            true => Run::resume(folder, plan.clone(), data, context(ranks)).unwrap(),
            false => {
                // All ranks have checked the folder before one of them writes.
                ranks.any(false);
                Run::create(folder, plan.clone(), data, context(ranks), false).unwrap()
            }
        };
        let (stop, mut losses) = (AtomicBool::new(false), Vec::new());
        let outcome = run.run(&stop, |event| {
            if let Event::Step { step, stats, .. } = event {
                losses.push(stats.loss);
                // Only rank 0 is asked to stop; all ranks do.
                stop.store(ranks.is_root() && step == until, std::sync::atomic::Ordering::Relaxed);
            }
        });
        assert_eq!(matches!(outcome.unwrap(), Outcome::Finished), until >= plan.schedule.total);
        losses
    });
    assert!(all.windows(2).all(|pair| pair[0] == pair[1]), "losses are bit-identical on all ranks");
    all.into_iter().next().unwrap()
}

fn load_weights(folder: &Path) -> Vec<f32> {
    let encoder = weights::load(&folder.join("encoder.safetensors"), &Device::flex()).unwrap();
    let statistics = encoder.weights.statistics.to_tree();
    encoder.weights.params.iter().chain(statistics.iter()).flat_map(|(_, leaf)| leaf.to_vec()).collect()
}

/// ‖a − b‖ / ‖a‖.
fn relative_difference(a: &[f32], b: &[f32]) -> f64 {
    let norm = |v: &mut dyn Iterator<Item = f64>| v.map(|x| x * x).sum::<f64>().sqrt();
    let difference = norm(&mut a.iter().zip(b).map(|(a, b)| f64::from(a - b)));
    difference / norm(&mut a.iter().map(|a| f64::from(*a)))
}

#[test]
fn data_parallel_matches_single_rank() {
    let (data, folder) = (data(), tempfile::tempdir().unwrap());
    let plan = plan(&data, &[]);
    let total = plan.schedule.total;
    assert!(total >= 5);
    let run = |name: &str, n| {
        (train(&folder.path().join(name), n, &plan, &data, total), load_weights(&folder.path().join(name)))
    };
    let (single, one) = run("one", 1);
    for (name, n) in [("two", 2), ("four", 4)] {
        let (losses, weights) = run(name, n);
        for (a, b) in single.iter().zip(&losses) {
            assert!((a - b).abs() < 1e-3 * a, "{n} ranks: losses {losses:?}, single rank {single:?}");
        }
        assert!(relative_difference(&one, &weights) < 1e-3, "{n} ranks: {}", relative_difference(&one, &weights));
    }
    // Without synchronized batch norm the losses differ.
    let unsynchronized = unsynchronized_plan(&data);
    let losses = train(&folder.path().join("unsynchronized"), 4, &unsynchronized, &data, total);
    assert!(single.iter().zip(&losses).any(|(a, b)| (a - b).abs() > 1e-2 * a), "{losses:?} and {single:?}");
}

fn unsynchronized_plan(data: &TrainingData) -> Plan {
    plan(data, &["train.sync_bn=false"])
}

#[test]
fn resumes_on_another_number_of_ranks() {
    let (data, folder) = (data(), tempfile::tempdir().unwrap());
    let plan = plan(&data, &[]);
    let total = plan.schedule.total;
    let one = train(&folder.path().join("one"), 1, &plan, &data, total);
    let mixed = folder.path().join("mixed");
    let mut losses = train(&mixed, 4, &plan, &data, 2);
    losses.extend(train(&mixed, 2, &plan, &data, 4));
    losses.extend(train(&mixed, 1, &plan, &data, total));
    assert_eq!(losses.len(), one.len());
    assert!(one.iter().zip(&losses).all(|(a, b)| (a - b).abs() < 1e-3 * a), "{losses:?} and {one:?}");
    assert!(relative_difference(&load_weights(&folder.path().join("one")), &load_weights(&mixed)) < 1e-3);
    // On the same number of ranks a resumed run is bit-identical.
    let (whole, parts) = (folder.path().join("whole"), folder.path().join("parts"));
    train(&whole, 2, &plan, &data, total);
    train(&parts, 2, &plan, &data, 3);
    train(&parts, 2, &plan, &data, total);
    assert_eq!(load_weights(&whole), load_weights(&parts));
}

#[test]
fn all_gather_returns_the_bytes_of_every_rank() {
    let own = ["", "second\n", "thïrd"];
    let gathered = on_ranks(3, |ranks| ranks.all_gather(own[ranks.rank()].as_bytes()));
    assert!(gathered.iter().all(|all| all == &own.map(|s| s.as_bytes().to_vec())));
    assert_eq!(Ranks::SINGLE.all_gather(b"one"), [b"one".to_vec()]);
}

#[test]
fn rejects_plans_that_cannot_be_split() {
    let data = data();
    let folder = tempfile::tempdir().unwrap();
    let is_rejected = |plan: Plan, n| {
        let all = on_ranks(n, |ranks| {
            Run::create(&folder.path().join("run"), plan.clone(), &data, context(ranks), false).map(|_| ())
        });
        all.into_iter().all(|r| matches!(r, Err(Error::Ranks { .. })))
    };
    assert!(is_rejected(plan(&data, &[]), 3));
    assert!(is_rejected(plan(&data, &["method.beta=1"]), 2));
    assert!(!folder.path().join("run").exists());
}
