//! Micro-batches on their way from the loader to the device.

use burn::tensor::{Device, Tensor, TensorData};

use super::{Plan, RunContext, recipe::Placement};
use crate::{
    data::{Images, MicroBatch, prefetch::Request},
    views::{Draw, device::augment},
};

/// Request for the micro-batches of a plan, without a range.
pub fn request(plan: &Plan, images: &Images, context: &RunContext) -> Request {
    let recipe = &plan.recipe;
    Request {
        images: images.clone(),
        policies: recipe.policies(),
        size: recipe.views.size,
        augmentation: context.augmentation.clone(),
        crop_only: recipe.views.placement == Placement::Device,
        n: plan.micro_batch(),
        part: [context.ranks.rank(), context.ranks.world_size()],
        buffer: recipe.train.shuffle,
        seed: recipe.seed,
        first: 0,
        last: 0,
        threads: context.threads,
    }
}

/// Copies both views of a micro-batch to the device, and runs the augmentations after the crop
/// there if the loader left them out. Returns `[N, H, W, C]` each.
pub fn to_device(batch: MicroBatch, device: &Device) -> (Tensor<4>, Tensor<4>) {
    let MicroBatch { n, size, channels, v, v2, draws } = batch;
    let tensor = |values, shape: [usize; 4]| Tensor::from_data(TensorData::new(values, shape), device);
    let Some([draws, draws2]) = draws else {
        let shape = [n, size, size, channels];
        return (tensor(v, shape), tensor(v2, shape));
    };
    let planes = [n, channels, size, size];
    let view = |crops, draws: &[Draw]| augment(tensor(crops, planes), draws).permute([0, 2, 3, 1]);
    (view(v, &draws), view(v2, &draws2))
}
