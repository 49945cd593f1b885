//! Choice of where augmentations after the crop run, by timing the first steps of the run, which
//! are then discarded.

use std::time::Instant;

use super::{
    Error, Plan, RunContext, TrainingData,
    batch::{request, to_device},
    recipe::Placement,
};
use crate::{
    byol::Byol,
    data::{Loader, MicroBatch, prefetch::Request},
};

/// Seconds per micro-batch.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AugmentTiming {
    /// Host: decoding and both complete views of every image.
    pub host_views: f64,
    /// Host: decoding and cropping.
    pub host_crops: f64,
    /// Device: loss, gradient and update.
    pub device_step: f64,
    /// Device: augmentations after the crop.
    pub device_augment: f64,
}

impl AugmentTiming {
    /// Seconds per micro-batch with augmentation on the host, and on the device. Host and device
    /// work in parallel.
    pub fn totals(self) -> [f64; 2] {
        [self.host_views.max(self.device_step), self.host_crops.max(self.device_step + self.device_augment)]
    }

    /// The faster placement.
    pub(crate) fn fastest(self) -> Placement {
        let [host, device] = self.totals();
        if device < host { Placement::Device } else { Placement::Cpu }
    }
}

/// Steps in which a device compiles and selects its kernels.
const WARMUP: u64 = 2;

/// Timed steps.
const TIMED: u64 = 3;

/// Steps after which a loss scale has settled, or never will.
const MAX_STEPS: u64 = 30;

/// Sets the augmentation placement of a plan that leaves it open, and returns the timing. `byol` is
/// the state that the run starts from.
///
/// # Errors
/// [`Error::Data`].
pub fn choose(
    plan: &mut Plan,
    data: &TrainingData,
    context: &RunContext,
    byol: &Byol,
) -> Result<Option<AugmentTiming>, Error> {
    if context.augmentation.is_some() && plan.recipe.views.placement == Placement::Auto {
        plan.recipe.views.placement = Placement::Cpu; // where a user-defined augmentation runs
    }
    if plan.recipe.views.placement != Placement::Auto {
        return Ok(None);
    }
    let timing = measure(plan, data, context, byol)?;
    plan.recipe.views.placement = context.ranks.broadcast_value(timing.fastest());
    Ok(Some(timing))
}

fn measure(plan: &Plan, data: &TrainingData, context: &RunContext, byol: &Byol) -> Result<AugmentTiming, Error> {
    let device = &context.device;
    let (host_views, views) = time_host(plan, data, context, Placement::Cpu)?;
    let (host_crops, crops) = time_host(plan, data, context, Placement::Device)?;
    let device_step = time_step(plan, byol, to_device(views, device));
    let mut device_augment = f64::INFINITY;
    for _ in 0..WARMUP + TIMED {
        let began = Instant::now();
        let (v, v2) = to_device(crops.clone(), device);
        let _: f32 = (v.sum() + v2.sum()).into_scalar();
        device_augment = device_augment.min(began.elapsed().as_secs_f64());
    }
    Ok(AugmentTiming { host_views, host_crops, device_step, device_augment })
}

/// Seconds of the fastest step on one pair of views.
fn time_step(plan: &Plan, byol: &Byol, views: (burn::tensor::Tensor<4>, burn::tensor::Tensor<4>)) -> f64 {
    let (mut byol, mut stepper) = (byol.clone(), super::step::Stepper { micro_batches: 1, ..plan.stepper() });
    // An asynchronous device is done when a value can be read.
    let wait = |byol: &Byol| byol.online.params.iter().next().map(|(_, leaf)| leaf.to_vec());
    let (mut fastest, mut warm, mut timed) = (f64::INFINITY, 0, 0);
    while timed < TIMED && byol.k < MAX_STEPS {
        let began = Instant::now();
        let next_views = || Ok::<_, std::convert::Infallible>(views.clone());
        let Ok((_, skipped)) = stepper.step(&mut byol, next_views, |_| ());
        wait(&byol);
        if skipped || warm < WARMUP {
            warm += 1;
            continue; // a step without an update is not representative
        }
        fastest = fastest.min(began.elapsed().as_secs_f64());
        timed += 1;
    }
    fastest
}

/// Seconds that the host takes for a micro-batch, at best, and the last micro-batch.
fn time_host(
    plan: &Plan,
    data: &TrainingData,
    context: &RunContext,
    placement: Placement,
) -> Result<(f64, MicroBatch), Error> {
    let mut plan = plan.clone();
    plan.recipe.views.placement = placement;
    let loader = Loader::start(Request { last: 1 + TIMED, ..request(&plan, &data.train, context) });
    let (mut fastest, mut batch) = (f64::INFINITY, loader.next_batch()?);
    for _ in 0..TIMED {
        let began = Instant::now();
        batch = loader.next_batch()?;
        fastest = fastest.min(began.elapsed().as_secs_f64());
    }
    Ok((fastest, batch))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chooses_the_device_where_the_pair_gets_faster() {
        let fastest = |host_views, host_crops, device_step, device_augment| {
            AugmentTiming { host_views, host_crops, device_step, device_augment }.fastest()
        };
        assert_eq!(fastest(0.05, 0.02, 0.1, 0.01), Placement::Cpu, "the host keeps up");
        assert_eq!(fastest(0.3, 0.1, 0.1, 0.02), Placement::Device);
        assert_eq!(fastest(0.11, 0.05, 0.1, 0.03), Placement::Cpu, "the device would lose more than the host gains");
        assert_eq!(fastest(0.3, 0.3, 0.1, 0.02), Placement::Cpu, "decoding dominates");
    }
}
