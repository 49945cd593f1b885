//! Batch norm in training, composed of Burn's tensor operations, for devices without kernels in
//! `byol-kernels`.
//!
//! One node of the autodiff graph, which computes in f32 in any compute precision, saves only its
//! input, and averages over all ranks in both passes.

// `#[backend_extension]` takes only plain signatures: tuples of tensors.
#![allow(clippy::type_complexity)]

#[cfg(any(feature = "gpu", feature = "cuda", feature = "rocm"))]
use burn::backend::Cube;
use burn::{
    backend::{
        Autodiff, AutodiffBackend, Backend, Dispatch, Flex, TensorMetadata,
        autodiff::{
            checkpoint::{base::Checkpointer, strategy::CheckpointStrategy},
            grads::Gradients,
            ops::{Backward, Ops, OpsKind},
        },
        backend_extension,
        tensor::FloatTensor,
    },
    tensor::{DType, FloatDType, Scalar, Shape, Tensor, TensorData, read_sync},
};

use crate::ranks::Ranks;

/// Batch norm on one backend. Every backend runs the same operations; [`Autodiff`] adds the node.
#[backend_extension(Autodiff, Flex, Cube: cfg(any(feature = "gpu", feature = "cuda", feature = "rocm")))]
pub trait BatchNorm: Backend {
    /// Returns γ (x − mean) / σ + β, mean and variance. `x`: `[N, C, …]`; the others `[C]`.
    fn norm_forward(
        x: FloatTensor<Self>,
        gamma: FloatTensor<Self>,
        beta: FloatTensor<Self>,
        eps: f64,
        ranks: Ranks,
    ) -> (FloatTensor<Self>, FloatTensor<Self>, FloatTensor<Self>) {
        forward::<Self>(x, gamma, beta, eps, ranks)
    }
}

impl BatchNorm for Flex {}

#[cfg(any(feature = "gpu", feature = "cuda", feature = "rocm"))]
impl BatchNorm for Cube {}

fn to_f32<B: Backend>(x: FloatTensor<B>) -> FloatTensor<B> {
    if x.dtype() == DType::F32 { x } else { B::float_cast(x, FloatDType::F32) }
}

/// Casts an f32 tensor.
fn from_f32<B: Backend>(x: FloatTensor<B>, dtype: DType) -> FloatTensor<B> {
    if dtype == DType::F32 { x } else { B::float_cast(x, FloatDType::from(dtype)) }
}

/// Shapes for per-channel operations on `[N, C, …]`.
struct ChannelShapes {
    /// `[1, C, 1, …]`
    broadcast: Shape,
    /// `[C]`
    channels: Shape,
    /// `[C, values per channel]`
    rows: Shape,
}

impl ChannelShapes {
    fn new(shape: &Shape) -> ChannelShapes {
        let c = shape[1];
        let mut broadcast = vec![1; shape.num_dims()];
        broadcast[1] = c;
        ChannelShapes {
            broadcast: Shape::from(broadcast),
            channels: Shape::new([c]),
            rows: Shape::new([c, shape.num_elements() / c]),
        }
    }

    fn rows<B: Backend>(&self, x: FloatTensor<B>) -> FloatTensor<B> {
        B::float_reshape(B::float_swap_dims(x, 0, 1), self.rows.clone())
    }

    fn broadcast<B: Backend>(&self, per_channel: FloatTensor<B>) -> FloatTensor<B> {
        B::float_reshape(per_channel, self.broadcast.clone())
    }

    /// Per-channel mean, `[C]`.
    fn mean<B: Backend>(&self, x: FloatTensor<B>) -> FloatTensor<B> {
        B::float_reshape(B::float_mean_dim(self.rows::<B>(x), 1), self.channels.clone())
    }

    /// Per-channel sum, `[C]`.
    fn sum<B: Backend>(&self, x: FloatTensor<B>) -> FloatTensor<B> {
        B::float_reshape(B::float_sum_dim(self.rows::<B>(x), 1), self.channels.clone())
    }
}

/// Averages two per-channel statistics over all ranks, whose batches have the same size. One
/// message, from the host, where MPI needs it. `encode` maps a channel's statistics to values that
/// average linearly, `decode` maps the averages back.
fn average_over_ranks<B: Backend>(
    own: [FloatTensor<B>; 2],
    ranks: Ranks,
    encode: fn([f64; 2]) -> [f64; 2],
    decode: fn([f64; 2]) -> [f64; 2],
) -> [FloatTensor<B>; 2] {
    if ranks == Ranks::SINGLE {
        return own;
    }
    let (device, c) = (own[0].device(), own[0].shape()[0]);
    let both = B::float_cat(own.to_vec(), 0);
    let data = read_sync(B::float_into_data(both)).expect("a computed tensor can be read");
    let values: Vec<f64> = data.iter::<f32>().map(f64::from).collect();
    let mut sums: Vec<f64> = (0..c).flat_map(|k| encode([values[k], values[c + k]])).collect();
    ranks.all_reduce_sum(&mut sums);
    let share = 1.0 / ranks.world_size() as f64;
    let averages: Vec<[f64; 2]> = sums.as_chunks::<2>().0.iter().map(|[a, b]| decode([a * share, b * share])).collect();
    [0, 1].map(|i| {
        let values: Vec<f32> = averages.iter().map(|pair| pair[i] as f32).collect();
        B::float_from_data(TensorData::new(values, [c]), &device)
    })
}

/// 1 / √(variance + ε).
fn inverse_std<B: Backend>(variance: FloatTensor<B>, eps: f64) -> FloatTensor<B> {
    B::float_recip(B::float_sqrt(B::float_add_scalar(variance, Scalar::Float(eps))))
}

fn forward<B: Backend>(
    x: FloatTensor<B>,
    gamma: FloatTensor<B>,
    beta: FloatTensor<B>,
    eps: f64,
    ranks: Ranks,
) -> (FloatTensor<B>, FloatTensor<B>, FloatTensor<B>) {
    let (shapes, dtype) = (ChannelShapes::new(&x.shape()), x.dtype());
    let x = to_f32::<B>(x);
    let center = |mean: &FloatTensor<B>| B::float_sub(x.clone(), shapes.broadcast::<B>(mean.clone()));
    let mean = shapes.mean::<B>(x.clone());
    let centered = center(&mean);
    let variance = shapes.mean::<B>(B::float_mul(centered.clone(), centered));
    // Mean squares average linearly, variances do not. In f64, so that subtracting the squared mean
    // afterwards loses nothing.
    let encode = |[mean, variance]: [f64; 2]| [mean, variance + mean * mean];
    let decode = |[mean, square]: [f64; 2]| [mean, (square - mean * mean).max(0.0)];
    let [mean, variance] = average_over_ranks::<B>([mean, variance], ranks, encode, decode);
    let scale = B::float_mul(gamma, inverse_std::<B>(variance.clone(), eps));
    let y = B::float_mul(center(&mean), shapes.broadcast::<B>(scale));
    (from_f32::<B>(B::float_add(y, shapes.broadcast::<B>(beta)), dtype), mean, variance)
}

/// Returns (dx, dγ, dβ). dx includes the dependence of the statistics on the images of all ranks;
/// dγ and dβ are sums over the images of this rank.
fn backward<B: Backend>(
    dout: FloatTensor<B>,
    x: FloatTensor<B>,
    gamma: FloatTensor<B>,
    mean: FloatTensor<B>,
    variance: FloatTensor<B>,
    eps: f64,
    ranks: Ranks,
) -> (FloatTensor<B>, FloatTensor<B>, FloatTensor<B>) {
    let (shapes, dtype) = (ChannelShapes::new(&x.shape()), x.dtype());
    let inverse_std = inverse_std::<B>(variance, eps);
    let centered = B::float_sub(to_f32::<B>(x), shapes.broadcast::<B>(mean));
    let y_hat = B::float_mul(centered, shapes.broadcast::<B>(inverse_std.clone()));
    let g = to_f32::<B>(dout);
    let g_y_hat = B::float_mul(g.clone(), y_hat.clone());
    let (dgamma, dbeta) = (shapes.sum::<B>(g_y_hat.clone()), shapes.sum::<B>(g.clone()));
    // dx = γ/σ (g − mean(g) − ŷ mean(g ŷ))
    let own = [shapes.mean::<B>(g.clone()), shapes.mean::<B>(g_y_hat)];
    let [mean_g, mean_g_y_hat] = average_over_ranks::<B>(own, ranks, |means| means, |means| means);
    let dx = B::float_sub(g, shapes.broadcast::<B>(mean_g));
    let dx = B::float_sub(dx, B::float_mul(y_hat, shapes.broadcast::<B>(mean_g_y_hat)));
    let dx = B::float_mul(dx, shapes.broadcast::<B>(B::float_mul(gamma, inverse_std)));
    (from_f32::<B>(dx, dtype), dgamma, dbeta)
}

impl<B: Backend + BatchNorm, C: CheckpointStrategy> BatchNorm for Autodiff<B, C> {
    fn norm_forward(
        x: FloatTensor<Self>,
        gamma: FloatTensor<Self>,
        beta: FloatTensor<Self>,
        eps: f64,
        ranks: Ranks,
    ) -> (FloatTensor<Self>, FloatTensor<Self>, FloatTensor<Self>) {
        #[derive(Debug)]
        struct Norm;

        /// Values saved for the backward pass.
        #[derive(Debug, Clone)]
        struct Saved<F> {
            x: F,
            gamma: F,
            mean: F,
            variance: F,
            eps: f64,
            ranks: Ranks,
        }

        impl<B: Backend + BatchNorm> Backward<B, 3> for Norm {
            type State = Saved<B::FloatTensorPrimitive>;

            fn backward(self, ops: Ops<Self::State, 3>, grads: &mut Gradients, _: &mut Checkpointer) {
                let dout = grads.consume::<B>(&ops.node);
                let Saved { x, gamma, mean, variance, eps, ranks } = ops.state;
                let (dx, dgamma, dbeta) = backward::<B>(dout, x, gamma, mean, variance, eps, ranks);
                for (node, gradient) in ops.parents.into_iter().zip([dx, dgamma, dbeta]) {
                    if let Some(node) = node {
                        grads.register::<B>(node.id, gradient);
                    }
                }
            }
        }

        let nodes = [x.node(), gamma.node(), beta.node()];
        let [x, gamma, beta] = [x, gamma, beta].map(|t| t.into_parts().0);
        let (out, mean, variance) = B::norm_forward(x.clone(), gamma.clone(), beta, eps, ranks);
        let constant = |t: &FloatTensor<B>| <Self as AutodiffBackend>::from_inner(t.clone());
        let statistics = [&mean, &variance].map(constant);
        let out = match Norm.prepare::<C>(nodes).compute_bound().stateful() {
            OpsKind::Tracked(prep) => prep.finish(Saved { x, gamma, mean, variance, eps, ranks }, out),
            OpsKind::UnTracked(prep) => prep.finish(out),
        };
        let [mean, variance] = statistics;
        (out, mean, variance)
    }
}

/// Returns norm(x) and the mean and biased variance of the batch, over all ranks.
///
/// # Shapes
/// `x`: `[N, C, …]`, in any precision; `gamma`, `beta`, mean and variance: `[C]`, f32.
pub fn batch_norm<const D: usize>(
    x: Tensor<D>,
    gamma: Tensor<1>,
    beta: Tensor<1>,
    eps: f64,
    ranks: Ranks,
) -> (Tensor<D>, Tensor<1>, Tensor<1>) {
    let (y, mean, variance) =
        Dispatch::norm_forward(x.into_dispatch(), gamma.into_dispatch(), beta.into_dispatch(), eps, ranks);
    (Tensor::from_dispatch(y), Tensor::from_dispatch(mean), Tensor::from_dispatch(variance))
}
