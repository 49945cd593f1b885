//! Convolution, batch norm, skip and ReLU, and pooling, on the CPU, computed by `byol-kernels`.
//!
//! In training a layer is cut where its norm begins: a convolution yields its raw output with the batch's statistics ([`Pending`]), and whoever
//! reads it normalises on the way. So a node of the autodiff graph is [norm, ReLU →] convolution, and the inner maps of a residual block
//! are written once and never as normalised values; the block's last norm, with the skip, is a node of its own ([`norm_act`]). A
//! convolution's backward pass goes through the norm it read through: it gathers that norm's sums while it writes dx. In evaluation the
//! norm is folded into the weights and a layer is one pass ([`eval`]).

// `#[backend_extension]` writes functions with as many arguments and results as the operation has.
#![allow(clippy::too_many_arguments, clippy::type_complexity)]

use burn::{
    backend::{
        Autodiff, AutodiffBackend, Backend, Dispatch, Flex, TensorMetadata,
        autodiff::{
            checkpoint::{base::Checkpointer, strategy::CheckpointStrategy},
            grads::Gradients,
            ops::{Backward, Ops, OpsKind},
        },
        backend_extension,
        flex::FlexTensor,
        tensor::FloatTensor,
    },
    tensor::{Tensor, TensorData},
};
use byol_kernels::{
    conv::{self, Input, Shape},
    isa::{self, Isa},
    norm::{self, Gate, Norm},
    pool::{self, Windows},
};

use super::pass::{Pass, Running};
use crate::{
    device::{self, Precision},
    ranks::Ranks,
};

/// How a convolution steps, and what it multiplies. Its padding is that which keeps the side of a map at stride 1.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Options {
    /// From one output pixel to the next.
    pub stride: usize,
    /// From one tap to the next.
    pub dilation: usize,
    /// Of the products.
    pub precision: Precision,
    /// Whose batches the norms before and behind it see.
    pub ranks: Ranks,
    /// Whether a norm follows, which needs the statistics.
    pub norm_follows: bool,
}

impl Options {
    /// Skips no pixel.
    pub fn dense(pass: &Pass) -> Options {
        Options { stride: 1, dilation: 1, precision: pass.precision, ranks: pass.ranks(), norm_follows: true }
    }

    /// The kernels.
    fn isa(self) -> &'static Isa {
        device::kernels(self.precision).expect("`device::check` comes before")
    }
}

/// The passes on one backend. Statistics are those of the batch; γ, β, mean and variance of a convolution are of the norm that it reads
/// through, and count where `pending`.
#[backend_extension(Autodiff, Flex)]
pub trait Kernels: Backend {
    /// y = conv(relu(norm(x)), w), or without `pending` conv(x, w): (y, its mean, its variance), the latter two empty unless a norm
    /// follows.
    fn conv_forward(
        x: FloatTensor<Self>,
        w: FloatTensor<Self>,
        gamma: FloatTensor<Self>,
        beta: FloatTensor<Self>,
        mean: FloatTensor<Self>,
        variance: FloatTensor<Self>,
        options: Options,
        eps: f64,
        pending: bool,
    ) -> (FloatTensor<Self>, FloatTensor<Self>, FloatTensor<Self>);

    /// (dx, dw, dγ, dβ). dx, dγ and dβ are empty unless `by_x`, the latter two unless `pending`.
    fn conv_backward(
        dy: FloatTensor<Self>,
        x: FloatTensor<Self>,
        w: FloatTensor<Self>,
        gamma: FloatTensor<Self>,
        beta: FloatTensor<Self>,
        mean: FloatTensor<Self>,
        variance: FloatTensor<Self>,
        options: Options,
        eps: f64,
        pending: bool,
        by_x: bool,
    ) -> (FloatTensor<Self>, FloatTensor<Self>, FloatTensor<Self>, FloatTensor<Self>);

    /// act(norm(y) (+ skip)). `skip` counts where `with_skip`.
    fn norm_act_forward(
        y: FloatTensor<Self>,
        gamma: FloatTensor<Self>,
        beta: FloatTensor<Self>,
        mean: FloatTensor<Self>,
        variance: FloatTensor<Self>,
        skip: FloatTensor<Self>,
        eps: f64,
        ranks: Ranks,
        with_skip: bool,
        relu: bool,
    ) -> FloatTensor<Self>;

    /// (dy, dγ, dβ, dskip). dskip is empty unless `with_skip`.
    fn norm_act_backward(
        dout: FloatTensor<Self>,
        out: FloatTensor<Self>,
        y: FloatTensor<Self>,
        gamma: FloatTensor<Self>,
        beta: FloatTensor<Self>,
        mean: FloatTensor<Self>,
        variance: FloatTensor<Self>,
        eps: f64,
        ranks: Ranks,
        with_skip: bool,
        relu: bool,
    ) -> (FloatTensor<Self>, FloatTensor<Self>, FloatTensor<Self>, FloatTensor<Self>);

    /// act(conv(x, w) + shift (+ skip)). Not differentiated.
    fn conv_act(
        x: FloatTensor<Self>,
        w: FloatTensor<Self>,
        shift: FloatTensor<Self>,
        skip: FloatTensor<Self>,
        options: Options,
        with_skip: bool,
        relu: bool,
    ) -> FloatTensor<Self>;

    /// The largest value of each window.
    fn max_pool_forward(x: FloatTensor<Self>, kernel: usize, stride: usize, padding: usize) -> FloatTensor<Self>;

    /// dx.
    fn max_pool_backward(
        dout: FloatTensor<Self>,
        out: FloatTensor<Self>,
        x: FloatTensor<Self>,
        kernel: usize,
        stride: usize,
        padding: usize,
    ) -> FloatTensor<Self>;

    /// The mean of each map.
    fn mean_forward(x: FloatTensor<Self>) -> FloatTensor<Self>;

    /// dx of maps of `h` by `w` pixels.
    fn mean_backward(dout: FloatTensor<Self>, h: usize, w: usize) -> FloatTensor<Self>;
}

/// The elements, in row-major order.
fn values(tensor: &FlexTensor) -> &[f32] {
    tensor.as_slice().expect("made contiguous on entry")
}

fn tensor(values: Vec<f32>, shape: &[usize]) -> FlexTensor {
    FlexTensor::from_data(TensorData::new(values, shape.to_vec()))
}

fn empty() -> FlexTensor {
    tensor(Vec::new(), &[0])
}

fn windows(x: &FlexTensor, kernel: usize, stride: usize, padding: usize) -> Windows {
    let x = x.shape();
    Windows { n: x[0], h: x[1], w: x[2], c: x[3], kernel, stride, padding }
}

fn shape(x: &FlexTensor, w: &FlexTensor, options: Options) -> Shape {
    let (x, w) = (x.shape(), w.shape());
    let Options { stride, dilation, .. } = options;
    let (kernel, padding) = (w[2], dilation * (w[2] / 2));
    Shape { n: x[0], h: x[1], w: x[2], c_in: x[3], c_out: w[0], kernel, stride, padding, dilation }
}

/// scale and shift of a norm.
fn affine([gamma, beta, mean, variance]: [&FlexTensor; 4], eps: f64) -> (Vec<f32>, Vec<f32>) {
    let inverse = norm::inverse_deviation(values(variance), eps);
    norm::scale_shift(values(gamma), values(beta), values(mean), &inverse)
}

fn normalisation([gamma, beta, mean, variance]: [&FlexTensor; 4], eps: f64) -> Norm {
    let inverse = norm::inverse_deviation(values(variance), eps);
    Norm::new(values(gamma), values(beta), values(mean), &inverse)
}

impl Kernels for Flex {
    fn conv_forward(
        x: FlexTensor,
        w: FlexTensor,
        gamma: FlexTensor,
        beta: FlexTensor,
        mean: FlexTensor,
        variance: FlexTensor,
        options: Options,
        eps: f64,
        pending: bool,
    ) -> (FlexTensor, FlexTensor, FlexTensor) {
        let [x, w, gamma, beta] = [x, w, gamma, beta].map(|t| t.to_contiguous());
        let (isa, s) = (options.isa(), shape(&x, &w, options));
        let pending = pending.then(|| {
            let (scale, shift) = affine([&gamma, &beta, &mean, &variance], eps);
            norm::Pending::new(&scale, &shift, true)
        });
        let input = Input { values: values(&x), pending: pending.as_ref() };
        let of_y = [s.n, s.h_out(), s.w_out(), s.c_out];
        if !options.norm_follows {
            let (y, _) = conv::forward_then(isa, &s, input, values(&w), |_, _| ());
            return (tensor(y, &of_y), empty(), empty());
        }
        let of_part = |_, y: &mut [f32]| norm::Moments::of(isa, y, s.c_out);
        let (y, parts) = conv::forward_then(isa, &s, input, values(&w), of_part);
        let mut moments = norm::Moments::together(&parts, s.c_out);
        if options.ranks != Ranks::ALONE {
            let mut sums = moments.sums();
            options.ranks.sum(&mut sums);
            moments = norm::Moments::of_sums(&sums);
        }
        let (mean, var) = moments.mean_variance();
        (tensor(y, &of_y), tensor(mean, &[s.c_out]), tensor(var, &[s.c_out]))
    }

    fn conv_backward(
        dy: FlexTensor,
        x: FlexTensor,
        w: FlexTensor,
        gamma: FlexTensor,
        beta: FlexTensor,
        mean: FlexTensor,
        variance: FlexTensor,
        options: Options,
        eps: f64,
        pending: bool,
        by_x: bool,
    ) -> (FlexTensor, FlexTensor, FlexTensor, FlexTensor) {
        let [dy, x, w, gamma, beta] = [dy, x, w, gamma, beta].map(|t| t.to_contiguous());
        let (isa, s) = (options.isa(), shape(&x, &w, options));
        let of_norm = [&gamma, &beta, &mean, &variance];
        let lazy = pending.then(|| {
            let (scale, shift) = affine(of_norm, eps);
            norm::Pending::new(&scale, &shift, true)
        });
        let input = Input { values: values(&x), pending: lazy.as_ref() };
        let dw = tensor(conv::backward_weight(isa, &s, input, values(&dy)), &w.shape());
        let of_x = [s.n, s.h, s.w, s.c_in];
        if !by_x {
            return (empty(), dw, empty(), empty());
        }
        if !pending {
            let dx = conv::backward_data(isa, &s, values(&w), values(&dy));
            return (tensor(dx, &of_x), dw, empty(), empty());
        }
        let norm = normalisation(of_norm, eps);
        let (mut g, sums) = conv::backward_data_then(isa, &s, values(&w), values(&dy), |at, g| {
            norm.sums(isa, g, &input.values[at..at + g.len()], Gate::Relu, None)
        });
        let totals = norm.totals(&sums, s.n * s.h * s.w, |sums| options.ranks.sum(sums));
        norm.by_y_in_place(isa, &totals, &mut g, input.values);
        let of_c = |v: Vec<f32>| tensor(v, &[s.c_in]);
        (tensor(g, &of_x), dw, of_c(totals.dgamma), of_c(totals.dbeta))
    }

    fn norm_act_forward(
        y: FlexTensor,
        gamma: FlexTensor,
        beta: FlexTensor,
        mean: FlexTensor,
        variance: FlexTensor,
        skip: FlexTensor,
        eps: f64,
        _: Ranks,
        with_skip: bool,
        relu: bool,
    ) -> FlexTensor {
        let [y, gamma, beta, skip] = [y, gamma, beta, skip].map(|t| t.to_contiguous());
        let (scale, shift) = affine([&gamma, &beta, &mean, &variance], eps);
        let skip = with_skip.then(|| values(&skip));
        tensor(norm::affine_act(isa::chosen(), values(&y), &scale, &shift, skip, relu), &y.shape())
    }

    fn norm_act_backward(
        dout: FlexTensor,
        out: FlexTensor,
        y: FlexTensor,
        gamma: FlexTensor,
        beta: FlexTensor,
        mean: FlexTensor,
        variance: FlexTensor,
        eps: f64,
        ranks: Ranks,
        with_skip: bool,
        relu: bool,
    ) -> (FlexTensor, FlexTensor, FlexTensor, FlexTensor) {
        let [dout, y, gamma, beta] = [dout, y, gamma, beta].map(|t| t.to_contiguous());
        let gate = match (with_skip, relu) {
            (false, false) => Gate::Open,
            (false, true) => Gate::Relu,
            (true, false) => Gate::Add,
            (true, true) => Gate::AddRelu(values(&out)),
        };
        let norm = normalisation([&gamma, &beta, &mean, &variance], eps);
        let g = norm::backward(isa::chosen(), values(&dout), gate, &norm, values(&y), |sums| ranks.sum(sums));
        let of_c = |v: Vec<f32>| tensor(v, &gamma.shape());
        let dskip = g.dskip.map_or_else(empty, |dskip| tensor(dskip, &y.shape()));
        (tensor(g.dy, &y.shape()), of_c(g.dgamma), of_c(g.dbeta), dskip)
    }

    fn conv_act(
        x: FlexTensor,
        w: FlexTensor,
        shift: FlexTensor,
        skip: FlexTensor,
        options: Options,
        with_skip: bool,
        relu: bool,
    ) -> FlexTensor {
        let [x, w, shift, skip] = [x, w, shift, skip].map(|t| t.to_contiguous());
        let (isa, s) = (options.isa(), shape(&x, &w, options));
        let (y, _) = conv::forward_then(isa, &s, values(&x).into(), values(&w), |at, y| {
            let skip = with_skip.then(|| &values(&skip)[at..at + y.len()]);
            norm::shift_act(isa, y, values(&shift), skip, relu);
        });
        tensor(y, &[s.n, s.h_out(), s.w_out(), s.c_out])
    }

    fn max_pool_forward(x: FlexTensor, kernel: usize, stride: usize, padding: usize) -> FlexTensor {
        let x = x.to_contiguous();
        let s = windows(&x, kernel, stride, padding);
        tensor(pool::max(isa::chosen(), &s, values(&x)), &[s.n, s.h_out(), s.w_out(), s.c])
    }

    fn max_pool_backward(
        dout: FlexTensor,
        out: FlexTensor,
        x: FlexTensor,
        kernel: usize,
        stride: usize,
        padding: usize,
    ) -> FlexTensor {
        let [dout, out, x] = [dout, out, x].map(|t| t.to_contiguous());
        let s = windows(&x, kernel, stride, padding);
        tensor(pool::max_backward(isa::chosen(), &s, values(&x), values(&out), values(&dout)), &x.shape())
    }

    fn mean_forward(x: FlexTensor) -> FlexTensor {
        let x = x.to_contiguous();
        let (n, c) = (x.shape()[0], x.shape()[3]);
        tensor(pool::mean(values(&x), n, c), &[n, c])
    }

    fn mean_backward(dout: FlexTensor, h: usize, w: usize) -> FlexTensor {
        let dout = dout.to_contiguous();
        let (n, c) = (dout.shape()[0], dout.shape()[1]);
        tensor(pool::mean_backward(values(&dout), h * w, c), &[n, h, w, c])
    }
}

impl<B: Backend + Kernels, C: CheckpointStrategy> Kernels for Autodiff<B, C> {
    fn conv_forward(
        x: FloatTensor<Self>,
        w: FloatTensor<Self>,
        gamma: FloatTensor<Self>,
        beta: FloatTensor<Self>,
        mean: FloatTensor<Self>,
        variance: FloatTensor<Self>,
        options: Options,
        eps: f64,
        pending: bool,
    ) -> (FloatTensor<Self>, FloatTensor<Self>, FloatTensor<Self>) {
        #[derive(Debug)]
        struct Conv;

        #[derive(Debug, Clone)]
        struct Kept<F> {
            x: F,
            w: F,
            /// γ, β, mean and variance of the norm that was read through.
            norm: [F; 4],
            options: Options,
            eps: f64,
            pending: bool,
        }

        impl<B: Backend + Kernels> Backward<B, 4> for Conv {
            type State = Kept<B::FloatTensorPrimitive>;

            fn backward(self, ops: Ops<Self::State, 4>, grads: &mut Gradients, _: &mut Checkpointer) {
                let [x, w, gamma, beta] = ops.parents;
                let dy = grads.consume::<B>(&ops.node);
                let k = ops.state;
                let [of_gamma, of_beta, mean, variance] = k.norm;
                let by_x = x.is_some() || k.pending;
                let (dx, dw, dgamma, dbeta) = B::conv_backward(
                    dy, k.x, k.w, of_gamma, of_beta, mean, variance, k.options, k.eps, k.pending, by_x,
                );
                let (gamma, beta) = (gamma.filter(|_| k.pending), beta.filter(|_| k.pending));
                for (node, gradient) in [(x, dx), (w, dw), (gamma, dgamma), (beta, dbeta)] {
                    if let Some(node) = node {
                        grads.register::<B>(node.id, gradient);
                    }
                }
            }
        }

        let nodes = [x.node(), w.node(), gamma.node(), beta.node()];
        let ((x, _), (w, _), (gamma, _), (beta, _)) =
            (x.into_parts(), w.into_parts(), gamma.into_parts(), beta.into_parts());
        let ((mean, _), (variance, _)) = (mean.into_parts(), variance.into_parts());
        let norm = [gamma, beta, mean, variance];
        let [gamma, beta, mean, variance] = norm.clone();
        let (y, of_mean, of_variance) =
            B::conv_forward(x.clone(), w.clone(), gamma, beta, mean, variance, options, eps, pending);
        let constant = |t: FloatTensor<B>| <Self as AutodiffBackend>::from_inner(t);
        let y = match Conv.prepare::<C>(nodes).compute_bound().stateful() {
            OpsKind::Tracked(prep) => prep.finish(Kept { x, w, norm, options, eps, pending }, y),
            OpsKind::UnTracked(prep) => prep.finish(y),
        };
        (y, constant(of_mean), constant(of_variance))
    }

    fn norm_act_forward(
        y: FloatTensor<Self>,
        gamma: FloatTensor<Self>,
        beta: FloatTensor<Self>,
        mean: FloatTensor<Self>,
        variance: FloatTensor<Self>,
        skip: FloatTensor<Self>,
        eps: f64,
        ranks: Ranks,
        with_skip: bool,
        relu: bool,
    ) -> FloatTensor<Self> {
        #[derive(Debug)]
        struct NormAct;

        #[derive(Debug, Clone)]
        struct Kept<F> {
            /// For the ReLU's mask.
            out: F,
            y: F,
            norm: [F; 4],
            eps: f64,
            ranks: Ranks,
            with_skip: bool,
            relu: bool,
        }

        impl<B: Backend + Kernels> Backward<B, 4> for NormAct {
            type State = Kept<B::FloatTensorPrimitive>;

            fn backward(self, ops: Ops<Self::State, 4>, grads: &mut Gradients, _: &mut Checkpointer) {
                let [y, gamma, beta, skip] = ops.parents;
                let dout = grads.consume::<B>(&ops.node);
                let k = ops.state;
                let [of_gamma, of_beta, mean, variance] = k.norm;
                let (dy, dgamma, dbeta, dskip) = B::norm_act_backward(
                    dout,
                    k.out,
                    k.y,
                    of_gamma,
                    of_beta,
                    mean,
                    variance,
                    k.eps,
                    k.ranks,
                    k.with_skip,
                    k.relu,
                );
                let skip = skip.filter(|_| k.with_skip);
                for (node, gradient) in [(y, dy), (gamma, dgamma), (beta, dbeta), (skip, dskip)] {
                    if let Some(node) = node {
                        grads.register::<B>(node.id, gradient);
                    }
                }
            }
        }

        let nodes = [y.node(), gamma.node(), beta.node(), skip.node()];
        let ((y, _), (gamma, _), (beta, _), (skip, _)) =
            (y.into_parts(), gamma.into_parts(), beta.into_parts(), skip.into_parts());
        let ((mean, _), (variance, _)) = (mean.into_parts(), variance.into_parts());
        let norm = [gamma, beta, mean, variance];
        let [gamma, beta, mean, variance] = norm.clone();
        let out = B::norm_act_forward(y.clone(), gamma, beta, mean, variance, skip, eps, ranks, with_skip, relu);
        match NormAct.prepare::<C>(nodes).compute_bound().stateful() {
            OpsKind::Tracked(prep) => prep.finish(Kept { out: out.clone(), y, norm, eps, ranks, with_skip, relu }, out),
            OpsKind::UnTracked(prep) => prep.finish(out),
        }
    }

    fn max_pool_forward(x: FloatTensor<Self>, kernel: usize, stride: usize, padding: usize) -> FloatTensor<Self> {
        #[derive(Debug)]
        struct MaxPool;

        #[derive(Debug, Clone)]
        struct Kept<F> {
            x: F,
            out: F,
            kernel: usize,
            stride: usize,
            padding: usize,
        }

        impl<B: Backend + Kernels> Backward<B, 1> for MaxPool {
            type State = Kept<B::FloatTensorPrimitive>;

            fn backward(self, ops: Ops<Self::State, 1>, grads: &mut Gradients, _: &mut Checkpointer) {
                let [x] = ops.parents;
                let dout = grads.consume::<B>(&ops.node);
                let k = ops.state;
                if let Some(x) = x {
                    let dx = B::max_pool_backward(dout, k.out, k.x, k.kernel, k.stride, k.padding);
                    grads.register::<B>(x.id, dx);
                }
            }
        }

        let nodes = [x.node()];
        let (x, _) = x.into_parts();
        let out = B::max_pool_forward(x.clone(), kernel, stride, padding);
        match MaxPool.prepare::<C>(nodes).compute_bound().stateful() {
            OpsKind::Tracked(prep) => prep.finish(Kept { x, out: out.clone(), kernel, stride, padding }, out),
            OpsKind::UnTracked(prep) => prep.finish(out),
        }
    }

    fn mean_forward(x: FloatTensor<Self>) -> FloatTensor<Self> {
        #[derive(Debug)]
        struct Mean;

        impl<B: Backend + Kernels> Backward<B, 1> for Mean {
            type State = [usize; 2];

            fn backward(self, ops: Ops<Self::State, 1>, grads: &mut Gradients, _: &mut Checkpointer) {
                let [x] = ops.parents;
                let dout = grads.consume::<B>(&ops.node);
                if let Some(x) = x {
                    let [h, w] = ops.state;
                    grads.register::<B>(x.id, B::mean_backward(dout, h, w));
                }
            }
        }

        let nodes = [x.node()];
        let (x, _) = x.into_parts();
        let side = [x.shape()[1], x.shape()[2]];
        let out = B::mean_forward(x);
        match Mean.prepare::<C>(nodes).compute_bound().stateful() {
            OpsKind::Tracked(prep) => prep.finish(side, out),
            OpsKind::UnTracked(prep) => prep.finish(out),
        }
    }

    fn max_pool_backward(
        _: FloatTensor<Self>,
        _: FloatTensor<Self>,
        _: FloatTensor<Self>,
        _: usize,
        _: usize,
        _: usize,
    ) -> FloatTensor<Self> {
        panic!("a gradient of a gradient is not supported")
    }

    fn mean_backward(_: FloatTensor<Self>, _: usize, _: usize) -> FloatTensor<Self> {
        panic!("a gradient of a gradient is not supported")
    }

    fn conv_act(
        _: FloatTensor<Self>,
        _: FloatTensor<Self>,
        _: FloatTensor<Self>,
        _: FloatTensor<Self>,
        _: Options,
        _: bool,
        _: bool,
    ) -> FloatTensor<Self> {
        panic!("the folded layer has no gradient: `conv_norm_act` composes the layer where one is wanted")
    }

    fn conv_backward(
        _: FloatTensor<Self>,
        _: FloatTensor<Self>,
        _: FloatTensor<Self>,
        _: FloatTensor<Self>,
        _: FloatTensor<Self>,
        _: FloatTensor<Self>,
        _: FloatTensor<Self>,
        _: Options,
        _: f64,
        _: bool,
        _: bool,
    ) -> (FloatTensor<Self>, FloatTensor<Self>, FloatTensor<Self>, FloatTensor<Self>) {
        panic!("a gradient of a gradient is not supported")
    }

    fn norm_act_backward(
        _: FloatTensor<Self>,
        _: FloatTensor<Self>,
        _: FloatTensor<Self>,
        _: FloatTensor<Self>,
        _: FloatTensor<Self>,
        _: FloatTensor<Self>,
        _: FloatTensor<Self>,
        _: f64,
        _: Ranks,
        _: bool,
        _: bool,
    ) -> (FloatTensor<Self>, FloatTensor<Self>, FloatTensor<Self>, FloatTensor<Self>) {
        panic!("a gradient of a gradient is not supported")
    }
}

/// A convolution's output, `[N, H, W, C]`, with the norm that is still to come; everything else `[C]`.
#[derive(Debug, Clone)]
pub struct Pending {
    y: Tensor<4>,
    gamma: Tensor<1>,
    beta: Tensor<1>,
    /// Of the batch.
    pub mean: Tensor<1>,
    /// Of the batch, biased.
    pub variance: Tensor<1>,
    eps: f64,
    ranks: Ranks,
}

impl Pending {
    /// The same of an output whose channels are four maps beside each other, `[N, H, W, 4 C]`, which `arrange` makes one of `C` channels: γ and β
    /// are of it, and its statistics are those of all four.
    pub fn of_four(self, arrange: impl Fn(Tensor<4>) -> Tensor<4>) -> Pending {
        let four = |t: Tensor<1>| {
            let [c] = t.dims();
            t.reshape([4, c / 4])
        };
        let (means, variances) = (four(self.mean), four(self.variance));
        let mean = means.clone().mean_dim(0);
        let between = (means - mean.clone()).square().mean_dim(0);
        let variance = (variances.mean_dim(0) + between).squeeze_dim(0);
        Pending { y: arrange(self.y), mean: mean.squeeze_dim(0), variance, ..self }
    }
}

/// What a convolution reads.
#[derive(Debug, Clone)]
#[allow(clippy::large_enum_variant, reason = "passed once by value; a box would be one more allocation a layer")]
pub enum Source {
    /// A finished map.
    Done(Tensor<4>),
    /// relu(norm(y)).
    Pending(Pending),
}

/// The convolution with the batch's statistics of its output; γ, β and ε are of the norm behind it.
///
/// # Shapes
/// `x`: `[N, H, W, C_in]`; `w`: `[C_out, C_in, K, K]`; `gamma`, `beta`: `[C_out]`.
pub fn conv(x: Source, w: Tensor<4>, gamma: Tensor<1>, beta: Tensor<1>, options: Options, eps: f64) -> Pending {
    let pending = matches!(x, Source::Pending(_));
    let (x, of_x, eps_of_x) = match x {
        Source::Done(x) => {
            let none = || Tensor::<1>::zeros([1], &w.device());
            (x, [none(), none(), none(), none()], eps)
        }
        Source::Pending(p) => (p.y, [p.gamma, p.beta, p.mean, p.variance], p.eps),
    };
    let [g, b, m, v] = of_x.map(Tensor::into_dispatch);
    let (y, mean, variance) =
        Dispatch::conv_forward(x.into_dispatch(), w.into_dispatch(), g, b, m, v, options, eps_of_x, pending);
    let (mean, variance) = (Tensor::from_dispatch(mean), Tensor::from_dispatch(variance));
    Pending { y: Tensor::from_dispatch(y), gamma, beta, mean, variance, eps, ranks: options.ranks }
}

/// The convolution alone.
///
/// # Shapes
/// As for [`conv`].
pub fn conv_alone(x: Source, w: Tensor<4>, options: Options) -> Tensor<4> {
    let none = || Tensor::<1>::zeros([1], &w.device());
    let (gamma, beta) = (none(), none());
    conv(x, w, gamma, beta, Options { norm_follows: false, ..options }, 0.0).y
}

/// act(norm(y) (+ skip)).
///
/// # Shapes
/// All `[N, H, W, C]`.
pub fn norm_act(p: Pending, skip: Option<Tensor<4>>, relu: bool) -> Tensor<4> {
    let with_skip = skip.is_some();
    let skip = skip.unwrap_or_else(|| Tensor::zeros([1, 1, 1, 1], &p.y.device()));
    Tensor::from_dispatch(Dispatch::norm_act_forward(
        p.y.into_dispatch(),
        p.gamma.into_dispatch(),
        p.beta.into_dispatch(),
        p.mean.into_dispatch(),
        p.variance.into_dispatch(),
        skip.into_dispatch(),
        p.eps,
        p.ranks,
        with_skip,
        relu,
    ))
}

/// The fused layer with running statistics, folded: act(conv(x, γ/σ · w) + β − γ/σ · mean (+ skip)). No tensor of it is tracked.
///
/// # Shapes
/// As for [`conv`]; `skip` and the result `[N, H', W', C_out]`.
pub fn eval(
    x: Tensor<4>,
    w: Tensor<4>,
    gamma: Tensor<1>,
    beta: Tensor<1>,
    running: &Running,
    skip: Option<Tensor<4>>,
    options: Options,
    eps: f64,
    relu: bool,
) -> Tensor<4> {
    let scale = gamma / running.var.clone().add_scalar(eps).sqrt();
    let shift = beta - running.mean.clone() * scale.clone();
    let [c_out] = scale.dims();
    let w = w * scale.reshape([c_out, 1, 1, 1]);
    let with_skip = skip.is_some();
    let skip = skip.unwrap_or_else(|| Tensor::zeros([1, 1, 1, 1], &w.device()));
    Tensor::from_dispatch(Dispatch::conv_act(
        x.into_dispatch(),
        w.into_dispatch(),
        shift.into_dispatch(),
        skip.into_dispatch(),
        options,
        with_skip,
        relu,
    ))
}

/// The largest value of each window.
///
/// # Shapes
/// `[N, H, W, C]` to `[N, H', W', C]`.
pub fn max_pool(x: Tensor<4>, kernel: usize, stride: usize, padding: usize) -> Tensor<4> {
    Tensor::from_dispatch(Dispatch::max_pool_forward(x.into_dispatch(), kernel, stride, padding))
}

/// The mean of each map.
///
/// # Shapes
/// `[N, H, W, C]` to `[N, C]`.
pub fn mean(x: Tensor<4>) -> Tensor<2> {
    Tensor::from_dispatch(Dispatch::mean_forward(x.into_dispatch()))
}
