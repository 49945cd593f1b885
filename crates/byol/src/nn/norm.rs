//! Batch norm in training of Burn's own operations, for devices without kernels of ours: a node of the autodiff graph that computes in f32
//! whatever its input is, keeps that input alone, and takes its means over all ranks, forward and backward.

// `#[backend_extension]` writes functions with as many arguments and results as the operation has.
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

/// Both passes on one backend: the same operations on all, but for what differentiates them.
#[backend_extension(Autodiff, Flex, Cube: cfg(any(feature = "gpu", feature = "cuda", feature = "rocm")))]
pub trait BatchNorm: Backend {
    /// (γ (x − mean) / σ + β, mean, variance) of `x`: `[N, C, …]`; the rest `[C]`.
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

fn wide<B: Backend>(x: FloatTensor<B>) -> FloatTensor<B> {
    if x.dtype() == DType::F32 { x } else { B::float_cast(x, FloatDType::F32) }
}

/// In the precision of `like`.
fn narrow<B: Backend>(x: FloatTensor<B>, like: DType) -> FloatTensor<B> {
    if like == DType::F32 { x } else { B::float_cast(x, FloatDType::from(like)) }
}

/// Where the channels of `x` are.
struct Channels {
    /// `[1, C, 1, …]`
    broadcast: Shape,
    /// `[C]`
    alone: Shape,
    /// `[C, values a channel]`
    rows: Shape,
}

impl Channels {
    fn of(shape: &Shape) -> Channels {
        let c = shape[1];
        let mut broadcast = vec![1; shape.num_dims()];
        broadcast[1] = c;
        Channels {
            broadcast: Shape::from(broadcast),
            alone: Shape::new([c]),
            rows: Shape::new([c, shape.num_elements() / c]),
        }
    }

    fn rows<B: Backend>(&self, x: FloatTensor<B>) -> FloatTensor<B> {
        B::float_reshape(B::float_swap_dims(x, 0, 1), self.rows.clone())
    }

    fn broadcast<B: Backend>(&self, of_c: FloatTensor<B>) -> FloatTensor<B> {
        B::float_reshape(of_c, self.broadcast.clone())
    }

    /// Each channel's mean, `[C]`.
    fn mean<B: Backend>(&self, x: FloatTensor<B>) -> FloatTensor<B> {
        B::float_reshape(B::float_mean_dim(self.rows::<B>(x), 1), self.alone.clone())
    }

    fn sum<B: Backend>(&self, x: FloatTensor<B>) -> FloatTensor<B> {
        B::float_reshape(B::float_sum_dim(self.rows::<B>(x), 1), self.alone.clone())
    }
}

/// The means of two figures a channel over all ranks, whose batches are of the same size; in one message, by the host, as MPI takes it.
/// `told` makes of a rank's figures what is averaged, `heard` the figures of all of the averages.
fn over_ranks<B: Backend>(
    own: [FloatTensor<B>; 2],
    ranks: Ranks,
    told: fn([f64; 2]) -> [f64; 2],
    heard: fn([f64; 2]) -> [f64; 2],
) -> [FloatTensor<B>; 2] {
    if ranks == Ranks::ALONE {
        return own;
    }
    let (device, c) = (own[0].device(), own[0].shape()[0]);
    let both = B::float_cat(own.to_vec(), 0);
    let data = read_sync(B::float_into_data(both)).expect("what the device has computed can be read");
    let values: Vec<f64> = data.iter::<f32>().map(f64::from).collect();
    let mut sums: Vec<f64> = (0..c).flat_map(|k| told([values[k], values[c + k]])).collect();
    ranks.sum(&mut sums);
    let share = 1.0 / ranks.count() as f64;
    let of_all: Vec<[f64; 2]> = sums.as_chunks::<2>().0.iter().map(|[a, b]| heard([a * share, b * share])).collect();
    [0, 1].map(|which| {
        let figures: Vec<f32> = of_all.iter().map(|figures| figures[which] as f32).collect();
        B::float_from_data(TensorData::new(figures, [c]), &device)
    })
}

fn inverse_deviation<B: Backend>(variance: FloatTensor<B>, eps: f64) -> FloatTensor<B> {
    B::float_recip(B::float_sqrt(B::float_add_scalar(variance, Scalar::Float(eps))))
}

fn forward<B: Backend>(
    x: FloatTensor<B>,
    gamma: FloatTensor<B>,
    beta: FloatTensor<B>,
    eps: f64,
    ranks: Ranks,
) -> (FloatTensor<B>, FloatTensor<B>, FloatTensor<B>) {
    let (channels, kind) = (Channels::of(&x.shape()), x.dtype());
    let x = wide::<B>(x);
    let centred = |mean: &FloatTensor<B>| B::float_sub(x.clone(), channels.broadcast::<B>(mean.clone()));
    let mean = channels.mean::<B>(x.clone());
    let apart = centred(&mean);
    let variance = channels.mean::<B>(B::float_mul(apart.clone(), apart));
    // The mean of the squares is what adds up; in f64, so that taking the square of the mean away again costs nothing.
    let told = |[mean, variance]: [f64; 2]| [mean, variance + mean * mean];
    let heard = |[mean, square]: [f64; 2]| [mean, (square - mean * mean).max(0.0)];
    let [mean, variance] = over_ranks::<B>([mean, variance], ranks, told, heard);
    let scale = B::float_mul(gamma, inverse_deviation::<B>(variance.clone(), eps));
    let y = B::float_mul(centred(&mean), channels.broadcast::<B>(scale));
    (narrow::<B>(B::float_add(y, channels.broadcast::<B>(beta)), kind), mean, variance)
}

/// (dx, dγ, dβ). dx counts what the images of all ranks have to do with the means; dγ and dβ are of the images here.
fn backward<B: Backend>(
    dout: FloatTensor<B>,
    x: FloatTensor<B>,
    gamma: FloatTensor<B>,
    mean: FloatTensor<B>,
    variance: FloatTensor<B>,
    eps: f64,
    ranks: Ranks,
) -> (FloatTensor<B>, FloatTensor<B>, FloatTensor<B>) {
    let (channels, kind) = (Channels::of(&x.shape()), x.dtype());
    let inverse = inverse_deviation::<B>(variance, eps);
    let centred = B::float_sub(wide::<B>(x), channels.broadcast::<B>(mean));
    let unit = B::float_mul(centred, channels.broadcast::<B>(inverse.clone())); // ŷ
    let g = wide::<B>(dout);
    let by_unit = B::float_mul(g.clone(), unit.clone());
    let (dgamma, dbeta) = (channels.sum::<B>(by_unit.clone()), channels.sum::<B>(g.clone()));
    // dx = γ/σ (g − mean(g) − ŷ mean(g ŷ))
    let own = [channels.mean::<B>(g.clone()), channels.mean::<B>(by_unit)];
    let [mean_g, mean_by_unit] = over_ranks::<B>(own, ranks, |same| same, |same| same);
    let dx = B::float_sub(g, channels.broadcast::<B>(mean_g));
    let dx = B::float_sub(dx, B::float_mul(unit, channels.broadcast::<B>(mean_by_unit)));
    let dx = B::float_mul(dx, channels.broadcast::<B>(B::float_mul(gamma, inverse)));
    (narrow::<B>(dx, kind), dgamma, dbeta)
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

        #[derive(Debug, Clone)]
        struct Kept<F> {
            /// x, γ, mean, variance.
            of: [F; 4],
            eps: f64,
            ranks: Ranks,
        }

        impl<B: Backend + BatchNorm> Backward<B, 3> for Norm {
            type State = Kept<B::FloatTensorPrimitive>;

            fn backward(self, ops: Ops<Self::State, 3>, grads: &mut Gradients, _: &mut Checkpointer) {
                let dout = grads.consume::<B>(&ops.node);
                let Kept { of: [x, gamma, mean, variance], eps, ranks } = ops.state;
                let (dx, dgamma, dbeta) = backward::<B>(dout, x, gamma, mean, variance, eps, ranks);
                for (node, gradient) in ops.parents.into_iter().zip([dx, dgamma, dbeta]) {
                    if let Some(node) = node {
                        grads.register::<B>(node.id, gradient);
                    }
                }
            }
        }

        let nodes = [x.node(), gamma.node(), beta.node()];
        let ((x, _), (gamma, _), (beta, _)) = (x.into_parts(), gamma.into_parts(), beta.into_parts());
        let (out, mean, variance) = B::norm_forward(x.clone(), gamma.clone(), beta, eps, ranks);
        let constant = |t: &FloatTensor<B>| <Self as AutodiffBackend>::from_inner(t.clone());
        let of_batch = (constant(&mean), constant(&variance));
        let out = match Norm.prepare::<C>(nodes).compute_bound().stateful() {
            OpsKind::Tracked(prep) => prep.finish(Kept { of: [x, gamma, mean, variance], eps, ranks }, out),
            OpsKind::UnTracked(prep) => prep.finish(out),
        };
        (out, of_batch.0, of_batch.1)
    }
}

/// (norm(x), mean, variance) with the statistics of the batch, of all ranks together.
///
/// # Shapes
/// `x`: `[N, C, …]`, of any precision; `gamma`, `beta`, mean and biased variance: `[C]`, f32.
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
