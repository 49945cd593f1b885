//! The guard: runs that must fail are named, runs that are well are left alone.

use std::sync::atomic::AtomicBool;

use burn::tensor::Device;
use byol::{
    byol::Gradient,
    data::{Loader, prefetch::Request, synthetic},
    train::{
        Error, Event, Place, Plan, Prepared, Recipe, Run,
        health::{self, Failure, Health, Kind},
        recipe::Draft,
        run::tensors,
    },
};

/// A recipe that learns, small enough for a test: about 400 steps.
const RECIPE: &str = include_str!("guard.toml");

fn plan(set: &[&str]) -> (Plan, Prepared) {
    let mut draft = Draft::from_text("guard", RECIPE).unwrap();
    for text in set {
        draft.set(text).unwrap();
    }
    let recipe = draft.over(&Recipe::default()).unwrap();
    let data = Prepared::new(synthetic::dataset(3, 700, 120), 0, &recipe.health, 0, &|_| ()).unwrap();
    (Plan::new("guard", recipe, &data, "cpu").unwrap(), data)
}

/// Runs until the end or a failure; what failed, and the figures at the end.
fn outcome(set: &[&str]) -> (Option<Failure>, Option<Health>) {
    let (plan, data) = plan(set);
    let folder = tempfile::tempdir().unwrap();
    let mut run = Run::create(&folder.path().join("run"), plan, &data, Place::alone(Device::flex(), 2), false).unwrap();
    let mut last = None;
    let result = run.go(&AtomicBool::new(false), |event| {
        if let Event::Epoch { health, .. } = event {
            last = health.cloned();
        }
    });
    let failure = match result {
        Ok(_) => None,
        Err(Error::Collapsed { failure, .. }) => Some(failure),
        Err(Error::Diverged { step, loss, .. }) => {
            Some(Failure { kind: Kind::Diverged, why: format!("{loss} at step {step}") })
        }
        Err(other) => panic!("{set:?}: {other}"),
    };
    println!("{set:?}: {failure:?} {last:?}");
    (failure, last)
}

#[test]
fn five_healthy_runs_are_left_alone() {
    for set in [
        &["seed=0"][..],
        // Long enough for each of the guard's questions.
        &["seed=1", "train.epochs=26"],
        &["seed=2", "heads.hidden=256", "views.first.blur=0.5"],
        &["seed=3", "optimizer.kind=lars", "optimizer.lr=1.0", "optimizer.weight_decay=1e-5"],
        &["seed=4", "target.tau=0.95", "views.size=24"],
    ] {
        let (failure, _) = outcome(set);
        assert_eq!(failure, None, "{set:?}");
    }
}

#[test]
fn induced_failures_are_named() {
    let wrong: Vec<_> = [
        (&["optimizer.lr=4.8"][..], Kind::Constant),
        (&["method.predictor=false"], Kind::Constant),
        (&["target.tau=0.0", "target.schedule=constant"], Kind::Constant),
        (&["method.stop_gradient=false"], Kind::Constant),
        (&["optimizer.lr=1e-7", "train.epochs=26"], Kind::PredictorLag),
    ]
    .into_iter()
    .filter_map(|(set, kind)| {
        let (failure, last) = outcome(set);
        (failure.as_ref().map(|f| f.kind) != Some(kind)).then_some((set, failure, last))
    })
    .collect();
    assert!(wrong.is_empty(), "{wrong:?}");
}

#[test]
fn a_run_that_goes_back_recovers() {
    let (plan, data) = plan(&["optimizer.lr=4.8", "health.on_collapse=rollback"]);
    let folder = tempfile::tempdir().unwrap();
    let mut run = Run::create(&folder.path().join("run"), plan, &data, Place::alone(Device::flex(), 2), false).unwrap();
    let (mut back, mut last) = (Vec::new(), None);
    run.go(&AtomicBool::new(false), |event| match event {
        Event::Rollback { from, to, peak, .. } => back.push((from, to, peak)),
        Event::Epoch { collapse, .. } => last = Some(collapse.map(str::to_owned)),
        _ => {}
    })
    .unwrap();
    assert!(!back.is_empty() && back.iter().all(|(from, to, _)| to < from), "{back:?}");
    assert!(back.windows(2).all(|pair| pair[1].2 == pair[0].2 / 2.0), "{back:?}");
    assert_eq!(last, Some(None), "healthy at the end, after {back:?}");
}

#[test]
fn a_flipped_sign_of_the_loss_is_divergence() {
    let (plan, data) = plan(&[]);
    let device = Device::flex();
    let mut byol = plan.start(&device);
    let watch = data.watch(&plan).unwrap();
    let (start, _) = health::measure(&byol, &watch, &device).unwrap();
    let views = &plan.recipe.views;
    let loader = Loader::start(Request {
        part: [0, 1],
        buffer: 1,
        crops: false,
        images: data.train.clone(),
        policies: [views.first.clone(), views.second.clone()],
        size: views.size,
        n: plan.recipe.train.batch,
        seed: 0,
        first: 0,
        last: plan.schedule.total,
        threads: 2,
    });
    let mut losses = Vec::new();
    while byol.k < plan.schedule.total {
        let (v, v2) = tensors(loader.next_batch().unwrap(), &device);
        let Gradient { loss, grads } = byol.gradient(v, v2, |_| ());
        losses.push(loss);
        byol.update(&Gradient { loss, grads: grads.map(|_, g| g.neg()) });
    }
    let last = &losses[losses.len() - 20..];
    let mean = last.iter().sum::<f64>() / last.len() as f64;
    let (health, _) = health::measure(&byol, &watch, &device).unwrap();
    let failure = health.failure(Some(&start), Some(mean), byol.k);
    assert_eq!(failure.map(|f| f.kind), Some(Kind::Diverged), "mean loss {mean}, {health:?}");
}
