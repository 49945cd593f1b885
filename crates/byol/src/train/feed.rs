//! Whether the host's cores can feed the device: measured before a run with its own first steps, which are then made again.

use std::time::Instant;

use super::{Error, Place, Plan, recipe::Finish, run::tensors};
use crate::data::{Images, Loader, prefetch::Request};

/// What one step takes, in seconds.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Feed {
    /// The host's cores: two finished views of every image of the step.
    pub host: f64,
    /// The device: the step itself.
    pub device: f64,
}

impl Feed {
    /// Where views are better finished.
    pub fn best(self) -> Finish {
        // A host that is just fast enough is too slow at times.
        if self.host > 0.9 * self.device { Finish::Device } else { Finish::Cpu }
    }
}

/// Steps until a device has compiled and chosen its programs.
const WARM: usize = 2;

/// Steps that are timed.
const TIMED: usize = 3;

/// Settles where a plan's views are finished, where it leaves that open; what was measured for it, if anything.
///
/// # Errors
/// [`Error::Data`].
pub fn settle(plan: &mut Plan, images: &Images, place: &Place) -> Result<Option<Feed>, Error> {
    if plan.recipe.views.finish != Finish::Auto {
        return Ok(None);
    }
    plan.recipe.views.finish = Finish::Cpu;
    let feed = measure(plan, images, place)?;
    plan.recipe.views.finish = place.ranks.agree(feed.best());
    Ok(Some(feed))
}

fn measure(plan: &Plan, images: &Images, place: &Place) -> Result<Feed, Error> {
    let steps = WARM + TIMED;
    let accumulate = plan.recipe.train.accumulate;
    let last = (accumulate * steps) as u64;
    let loader = Loader::start(Request { first: 0, last, ..request(plan, images, place) });
    let mut times = vec![Instant::now()];
    let mut batches = Vec::new();
    for _ in 0..steps {
        let step = (0..accumulate).map(|_| loader.next_batch()).collect::<Result<Vec<_>, _>>()?;
        batches.push(step);
        times.push(Instant::now());
    }
    // The fastest: what else the machine does is not asked for.
    let fastest =
        |times: &[Instant]| times.windows(2).map(|t| (t[1] - t[0]).as_secs_f64()).fold(f64::INFINITY, f64::min);
    let host = fastest(&times[1..]);
    let mut byol = plan.start(&place.device);
    let mut times = Vec::new();
    for step in batches {
        let mut step = step.into_iter();
        let give = || step.next().map(|batch| tensors(batch, &place.device)).ok_or(());
        byol.step(accumulate, give, |_| ()).expect("as many micro-batches as a step has");
        // A device that works on its own has finished when a value can be read.
        byol.online.params.iter().next().map(|(_, leaf)| leaf.to_vec());
        times.push(Instant::now());
    }
    Ok(Feed { host, device: fastest(&times[WARM - 1..]) })
}

/// What a loader makes for this plan, but for how much of it.
pub fn request(plan: &Plan, images: &Images, place: &Place) -> Request {
    let recipe = &plan.recipe;
    Request {
        images: images.clone(),
        policies: [recipe.views.first.clone(), recipe.views.second.clone()],
        size: recipe.views.size,
        crops: recipe.views.finish == Finish::Device,
        n: plan.micro_batch(),
        part: [place.ranks.rank(), place.ranks.count()],
        buffer: recipe.train.shuffle,
        seed: recipe.seed,
        first: 0,
        last: 0,
        threads: place.threads,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_device_finishes_what_the_host_is_too_slow_for() {
        assert_eq!(Feed { host: 0.05, device: 0.1 }.best(), Finish::Cpu);
        assert_eq!(Feed { host: 0.095, device: 0.1 }.best(), Finish::Device);
        assert_eq!(Feed { host: 0.3, device: 0.1 }.best(), Finish::Device);
    }
}
