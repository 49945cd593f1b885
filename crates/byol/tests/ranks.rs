//! Several ranks walk as one does: the same batches, statistics of all, the mean gradient. Here they are threads; `cli/tests/mpi.rs` has the
//! same for processes.

mod common;

use std::{path::Path, sync::atomic::AtomicBool, thread};

use burn::tensor::Device;
use byol::{
    data::synthetic,
    nn::weights,
    ranks::{Ranks, threads},
    train::{Error, Event, Outcome, Place, Plan, Prepared, Recipe, Run, recipe::Draft},
};

fn data() -> Prepared {
    let recipe = Recipe::default();
    Prepared::new(synthetic::dataset(3, 48, 16), 0, &recipe.health, 1 << 30, &|_| ()).unwrap()
}

fn plan(data: &Prepared, more: &[&str]) -> Plan {
    let mut draft = Draft::from_recipe("auto").unwrap();
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
        // Each number of ranks rounds otherwise, a GPU from run to run; large steps on so few images make thousandths of it.
        "optimizer.lr=0.002",
        "views.finish=cpu",
    ];
    settings.iter().chain(more).for_each(|s| draft.set(s).unwrap());
    Plan::new("test", draft.over(&Recipe::default()).unwrap(), data, "cpu").unwrap()
}

/// What `work` gives on each of `n` ranks.
fn on_ranks<T: Send>(n: usize, work: impl Fn(Ranks) -> T + Sync) -> Vec<T> {
    if n == 1 {
        return vec![work(Ranks::ALONE)];
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

fn place(ranks: Ranks) -> Place {
    Place { device: common::device(), threads: 1, ranks }
}

/// Losses of a whole run by so many ranks, from its folder's state or anew; it stops after `until` steps.
fn walk(folder: &Path, n: usize, plan: &Plan, data: &Prepared, until: u64) -> Vec<f64> {
    let all = on_ranks(n, |ranks| {
        let mut run = match folder.join("plan.toml").exists() {
            true => Run::resume(folder, plan.clone(), data, place(ranks)).unwrap(),
            false => {
                // All look before one of them writes.
                ranks.any(false);
                Run::create(folder, plan.clone(), data, place(ranks), false).unwrap()
            }
        };
        let (stop, mut losses) = (AtomicBool::new(false), Vec::new());
        let outcome = run.go(&stop, |event| {
            if let Event::Step { step, report, .. } = event {
                losses.push(report.loss);
                // The first alone is asked to stop; all do.
                stop.store(ranks.leads() && step == until, std::sync::atomic::Ordering::Relaxed);
            }
        });
        assert_eq!(matches!(outcome.unwrap(), Outcome::Finished), until >= plan.schedule.total);
        losses
    });
    assert!(all.windows(2).all(|pair| pair[0] == pair[1]), "all ranks see the same losses, to the bit");
    all.into_iter().next().unwrap()
}

fn weights_of(folder: &Path) -> Vec<f32> {
    let encoder = weights::load(&folder.join("encoder.safetensors"), &Device::flex()).unwrap();
    let statistics = encoder.weights.statistics.to_tree();
    encoder.weights.params.iter().chain(statistics.iter()).flat_map(|(_, leaf)| leaf.to_vec()).collect()
}

fn apart(a: &[f32], b: &[f32]) -> f64 {
    let square = |v: &mut dyn Iterator<Item = f64>| v.map(|x| x * x).sum::<f64>().sqrt();
    let difference = square(&mut a.iter().zip(b).map(|(a, b)| f64::from(a - b)));
    difference / square(&mut a.iter().map(|a| f64::from(*a)))
}

#[test]
fn ranks_walk_as_one_does() {
    let (data, folder) = (data(), tempfile::tempdir().unwrap());
    let plan = plan(&data, &[]);
    let total = plan.schedule.total;
    assert!(total >= 5);
    let run = |name: &str, n| {
        (walk(&folder.path().join(name), n, &plan, &data, total), weights_of(&folder.path().join(name)))
    };
    let (losses, one) = run("one", 1);
    for (name, n) in [("two", 2), ("four", 4)] {
        let (of_ranks, weights) = run(name, n);
        for (a, b) in losses.iter().zip(&of_ranks) {
            assert!((a - b).abs() < 1e-3 * a, "{n} ranks: losses {of_ranks:?}, of one {losses:?}");
        }
        assert!(apart(&one, &weights) < 1e-3, "{n} ranks: {}", apart(&one, &weights));
    }
    // The same of norms that see their own rank's images alone is another walk.
    let own = plan_with_own_norms(&data);
    let other = walk(&folder.path().join("own"), 4, &own, &data, total);
    assert!(losses.iter().zip(&other).any(|(a, b)| (a - b).abs() > 1e-2 * a), "{other:?} and {losses:?}");
}

fn plan_with_own_norms(data: &Prepared) -> Plan {
    plan(data, &["train.sync_bn=false"])
}

#[test]
fn another_number_of_ranks_goes_on() {
    let (data, folder) = (data(), tempfile::tempdir().unwrap());
    let plan = plan(&data, &[]);
    let total = plan.schedule.total;
    let one = walk(&folder.path().join("one"), 1, &plan, &data, total);
    let mixed = folder.path().join("mixed");
    let mut losses = walk(&mixed, 4, &plan, &data, 2);
    losses.extend(walk(&mixed, 2, &plan, &data, 4));
    losses.extend(walk(&mixed, 1, &plan, &data, total));
    assert_eq!(losses.len(), one.len());
    assert!(one.iter().zip(&losses).all(|(a, b)| (a - b).abs() < 1e-3 * a), "{losses:?} and {one:?}");
    assert!(apart(&weights_of(&folder.path().join("one")), &weights_of(&mixed)) < 1e-3);
    // With the same number the bits are those of a run that never stopped.
    let (whole, parts) = (folder.path().join("whole"), folder.path().join("parts"));
    walk(&whole, 2, &plan, &data, total);
    walk(&parts, 2, &plan, &data, 3);
    walk(&parts, 2, &plan, &data, total);
    assert_eq!(weights_of(&whole), weights_of(&parts));
}

#[test]
fn each_rank_hears_what_all_have() {
    let said = ["", "of the second\n", "ünd third"];
    let heard = on_ranks(3, |ranks| ranks.gather(said[ranks.rank()].as_bytes()));
    assert!(heard.iter().all(|all| all == &said.map(|s| s.as_bytes().to_vec())));
    assert_eq!(Ranks::ALONE.gather(b"one"), [b"one".to_vec()]);
}

#[test]
fn what_cannot_be_shared_is_refused() {
    let data = data();
    let folder = tempfile::tempdir().unwrap();
    let refused = |plan: Plan, n| {
        let all = on_ranks(n, |ranks| {
            Run::create(&folder.path().join("run"), plan.clone(), &data, place(ranks), false).map(|_| ())
        });
        all.into_iter().all(|r| matches!(r, Err(Error::Ranks { .. })))
    };
    assert!(refused(plan(&data, &[]), 3));
    assert!(refused(plan(&data, &["method.beta=1"]), 2));
    assert!(!folder.path().join("run").exists());
}
