//! Whether the host's cores can feed the device: measured before a run with its own first steps, which are then made again.

use std::time::Instant;

use super::{Error, Place, Plan, recipe::Finish, run::tensors};
use crate::{
    byol::Byol,
    data::{Images, Loader, MicroBatch, prefetch::Request},
};

/// What a micro-batch takes, in seconds.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Feed {
    /// The host's cores: decoding, and both views of every image.
    pub views: f64,
    /// The host's cores, of that: decoding and cropping.
    pub crops: f64,
    /// The device: loss, gradient and update.
    pub step: f64,
    /// The device: what follows the crop.
    pub finish: f64,
}

impl Feed {
    /// Seconds a micro-batch with views finished on the host, and on the device: the two work side by side.
    pub fn paces(self) -> [f64; 2] {
        [self.views.max(self.step), self.crops.max(self.step + self.finish)]
    }

    /// Where views are better finished.
    pub fn best(self) -> Finish {
        let [on_host, on_device] = self.paces();
        if on_device < on_host { Finish::Device } else { Finish::Cpu }
    }
}

/// Steps until a device has compiled and chosen its programs.
const WARM: u64 = 2;

/// Steps that are timed.
const TIMED: u64 = 3;

/// Steps after which a scaled loss has found its scale, or never will.
const MOST: u64 = 30;

/// Settles where a plan's views are finished, where it leaves that open; what was measured for it, if anything. `byol` is where the run begins.
///
/// # Errors
/// [`Error::Data`].
pub fn settle(plan: &mut Plan, images: &Images, place: &Place, byol: &Byol) -> Result<Option<Feed>, Error> {
    if plan.recipe.views.finish != Finish::Auto {
        return Ok(None);
    }
    let feed = measure(plan, images, place, byol)?;
    plan.recipe.views.finish = place.ranks.agree(feed.best());
    Ok(Some(feed))
}

fn measure(plan: &Plan, images: &Images, place: &Place, byol: &Byol) -> Result<Feed, Error> {
    let (views, whole) = supply(plan, images, place, Finish::Cpu)?;
    let (crops, cropped) = supply(plan, images, place, Finish::Device)?;
    let mut byol = byol.clone();
    let (v, v2) = tensors(whole, &place.device);
    // A device that works on its own has finished when a value can be read.
    let wait = |byol: &Byol| byol.online.params.iter().next().map(|(_, leaf)| leaf.to_vec());
    let mut step = f64::INFINITY;
    let (mut warm, mut timed) = (0, 0);
    while timed < TIMED && byol.k < MOST {
        let began = Instant::now();
        let mut once = Some((v.clone(), v2.clone()));
        let report = byol.step(1, || once.take().ok_or(()), |_| ()).expect("a step has its one micro-batch");
        wait(&byol);
        if report.skipped || warm < WARM {
            warm += 1;
            continue; // a step without its update says too little
        }
        step = step.min(began.elapsed().as_secs_f64());
        timed += 1;
    }
    let mut finish = f64::INFINITY;
    for _ in 0..WARM + TIMED {
        let began = Instant::now();
        let (v, v2) = tensors(cropped.clone(), &place.device);
        let _: f32 = (v.sum() + v2.sum()).into_scalar();
        finish = finish.min(began.elapsed().as_secs_f64());
    }
    Ok(Feed { views, crops, step, finish })
}

/// Seconds that the host takes for a micro-batch, at best, and the last of them.
fn supply(plan: &Plan, images: &Images, place: &Place, finish: Finish) -> Result<(f64, MicroBatch), Error> {
    let mut plan = plan.clone();
    plan.recipe.views.finish = finish;
    let loader = Loader::start(Request { last: 1 + TIMED, ..request(&plan, images, place) });
    let (mut best, mut batch) = (f64::INFINITY, loader.next_batch()?);
    for _ in 0..TIMED {
        let began = Instant::now();
        batch = loader.next_batch()?;
        best = best.min(began.elapsed().as_secs_f64());
    }
    Ok((best, batch))
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
    fn the_device_finishes_where_that_makes_the_pair_faster() {
        let of = |views, crops, step, finish| Feed { views, crops, step, finish }.best();
        assert_eq!(of(0.05, 0.02, 0.1, 0.01), Finish::Cpu, "the host is fast enough");
        assert_eq!(of(0.3, 0.1, 0.1, 0.02), Finish::Device);
        assert_eq!(of(0.11, 0.05, 0.1, 0.03), Finish::Cpu, "the device would lose more than the host does");
        assert_eq!(of(0.3, 0.3, 0.1, 0.02), Finish::Cpu, "decoding alone takes all the time");
    }
}
