//! Nodes of the autodiff graph for [`FusedOps`].
//!
//! A node has as many parents as its variant has differentiable inputs; the gradients are
//! registered in the order of the parents.

// `#[backend_extension]` needs the result types spelled out.
#![allow(clippy::type_complexity)]

use burn::backend::{
    Autodiff, AutodiffBackend, Backend, TensorMetadata,
    autodiff::{
        checkpoint::{base::Checkpointer, strategy::CheckpointStrategy},
        grads::Gradients,
        ops::{Backward, NodeGuard, Ops, OpsKind},
    },
    tensor::FloatTensor,
};
use burn::tensor::DType;

use super::ops::{
    ConvInput, ConvOptions, Epilogue, EpilogueKind, FusedGrads, FusedOps, NormParams, OtherGradients, OutputMoments,
    PoolOptions,
};
use crate::nn::readers::Readers;

/// Separates the values of a norm's parameters from the nodes of γ and β.
fn split_norm<B: Backend, C: CheckpointStrategy>(norm: NormParams<Autodiff<B, C>>) -> (NormParams<B>, [NodeGuard; 2]) {
    let NormParams { gamma, beta, mean, variance, eps, ranks } = norm;
    let ((gamma, gamma_node), (beta, beta_node)) = (gamma.into_parts(), beta.into_parts());
    let [mean, variance] = [mean, variance].map(|t| t.into_primitive());
    (NormParams { gamma, beta, mean, variance, eps, ranks }, [gamma_node, beta_node])
}

#[derive(Debug)]
struct Conv;

#[derive(Debug, Clone)]
struct ConvState<B: Backend> {
    input: ConvInput<B>,
    w: FloatTensor<B>,
    w_readers: Readers,
    options: ConvOptions,
}

/// Parents: x and w, or for a deferred norm y, w, γ and β.
impl<B: FusedGrads, const N: usize> Backward<B, N> for Conv {
    type State = ConvState<B>;

    fn backward(self, ops: Ops<Self::State, N>, grads: &mut Gradients, _: &mut Checkpointer) {
        let dy = grads.consume::<B>(&ops.node);
        let ConvState { input, w, w_readers, options } = ops.state;
        // The gradient that another reader has registered. That of a leaf, which has no parents,
        // cannot be taken out.
        let mut take_registered = |readers: &Readers, parent: usize| {
            let node = ops.parents[parent].as_ref().filter(|node| !node.parents.is_empty())?;
            readers.register().then(|| grads.consume::<B>(node))
        };
        let others = OtherGradients {
            input: match &input {
                ConvInput::Map { readers, .. } => take_registered(readers, 0),
                ConvInput::Deferred { .. } => None,
            },
            w: take_registered(&w_readers, 1),
        };
        let needs_input_grad = ops.parents[0].is_some();
        let g = B::conv_backward(dy, input, w, options, needs_input_grad, others);
        let gradients = [g.input, Some(g.w)].into_iter().chain(g.norm.into_iter().flatten().map(Some));
        for (node, gradient) in ops.parents.into_iter().zip(gradients) {
            if let (Some(node), Some(gradient)) = (node, gradient) {
                grads.register::<B>(node.id, gradient);
            }
        }
    }
}

fn conv<B: FusedGrads, C: CheckpointStrategy, const N: usize>(
    parents: [NodeGuard; N],
    input: ConvInput<B>,
    (w, w_readers): (FloatTensor<B>, Readers),
    options: ConvOptions,
) -> (FloatTensor<Autodiff<B, C>>, OutputMoments<Autodiff<B, C>>) {
    let (y, moments) = B::conv(input.clone(), w.clone(), w_readers.clone(), options);
    let y = match Backward::<B, N>::prepare::<C>(Conv, parents).compute_bound().stateful() {
        OpsKind::Tracked(prep) => prep.finish(ConvState { input, w, w_readers, options }, y),
        OpsKind::UnTracked(prep) => prep.finish(y),
    };
    let constant = |t: FloatTensor<B>| <Autodiff<B, C> as AutodiffBackend>::from_inner(t);
    (y, moments.map(|(mean, variance)| (constant(mean), constant(variance))))
}

#[derive(Debug)]
struct NormAct;

#[derive(Debug, Clone)]
struct NormActState<B: Backend> {
    /// Output, for the mask of the ReLU after a skip.
    out: Option<FloatTensor<B>>,
    y: FloatTensor<B>,
    norm: NormParams<B>,
    epilogue: EpilogueKind,
    /// Readers of the skip.
    readers: Option<Readers>,
}

/// Parents: y, γ, β, and the skip if there is one.
impl<B: FusedGrads, const N: usize> Backward<B, N> for NormAct {
    type State = NormActState<B>;

    fn backward(self, ops: Ops<Self::State, N>, grads: &mut Gradients, _: &mut Checkpointer) {
        let dout = grads.consume::<B>(&ops.node);
        let NormActState { out, y, norm, epilogue, readers } = ops.state;
        let g = B::norm_act_backward(dout, out, y, norm, epilogue);
        if let (Some(readers), Some(Some(_))) = (readers, ops.parents.get(3)) {
            readers.register();
        }
        let gradients = [g.y, g.gamma, g.beta].into_iter().chain(g.skip);
        for (node, gradient) in ops.parents.into_iter().zip(gradients) {
            if let Some(node) = node {
                grads.register::<B>(node.id, gradient);
            }
        }
    }
}

fn norm_act<B: FusedGrads, C: CheckpointStrategy, const N: usize>(
    parents: [NodeGuard; N],
    y: FloatTensor<B>,
    norm: NormParams<B>,
    epilogue: Epilogue<B>,
) -> FloatTensor<Autodiff<B, C>> {
    let kind = epilogue.kind();
    let readers = match &epilogue {
        Epilogue::AddRelu { readers, .. } => Some(readers.clone()),
        Epilogue::None | Epilogue::Relu => None,
    };
    let out = B::norm_act(y.clone(), norm.clone(), epilogue);
    match Backward::<B, N>::prepare::<C>(NormAct, parents).compute_bound().stateful() {
        OpsKind::Tracked(prep) => {
            let kept = (kind == EpilogueKind::AddRelu).then(|| out.clone());
            prep.finish(NormActState { out: kept, y, norm, epilogue: kind, readers }, out)
        }
        OpsKind::UnTracked(prep) => prep.finish(out),
    }
}

#[derive(Debug)]
struct MaxPool;

#[derive(Debug, Clone)]
struct MaxPoolState<B: Backend> {
    x: FloatTensor<B>,
    out: FloatTensor<B>,
    options: PoolOptions,
}

impl<B: FusedGrads> Backward<B, 1> for MaxPool {
    type State = MaxPoolState<B>;

    fn backward(self, ops: Ops<Self::State, 1>, grads: &mut Gradients, _: &mut Checkpointer) {
        let dout = grads.consume::<B>(&ops.node);
        let MaxPoolState { x, out, options } = ops.state;
        if let [Some(node)] = ops.parents {
            grads.register::<B>(node.id, B::max_pool_backward(dout, out, x, options));
        }
    }
}

#[derive(Debug)]
struct MeanPool;

impl<B: FusedGrads> Backward<B, 1> for MeanPool {
    /// Height and width of the maps, and their type.
    type State = ([usize; 2], DType);

    fn backward(self, ops: Ops<Self::State, 1>, grads: &mut Gradients, _: &mut Checkpointer) {
        let dout = grads.consume::<B>(&ops.node);
        if let [Some(node)] = ops.parents {
            let (size, dtype) = ops.state;
            grads.register::<B>(node.id, B::mean_pool_backward(dout, size, dtype));
        }
    }
}

impl<B: FusedGrads, C: CheckpointStrategy> FusedOps for Autodiff<B, C> {
    fn conv(
        input: ConvInput<Self>,
        w: FloatTensor<Self>,
        w_readers: Readers,
        options: ConvOptions,
    ) -> (FloatTensor<Self>, OutputMoments<Self>) {
        let (w, w_node) = w.into_parts();
        let w = (w, w_readers);
        match input {
            ConvInput::Map { x, readers } => {
                let (x, x_node) = x.into_parts();
                conv::<B, C, 2>([x_node, w_node], ConvInput::Map { x, readers }, w, options)
            }
            ConvInput::Deferred { y, norm } => {
                let ((y, y_node), (norm, [gamma_node, beta_node])) = (y.into_parts(), split_norm(norm));
                let parents = [y_node, w_node, gamma_node, beta_node];
                conv::<B, C, 4>(parents, ConvInput::Deferred { y, norm }, w, options)
            }
        }
    }

    fn norm_act(y: FloatTensor<Self>, norm: NormParams<Self>, epilogue: Epilogue<Self>) -> FloatTensor<Self> {
        let ((y, y_node), (norm, [gamma_node, beta_node])) = (y.into_parts(), split_norm(norm));
        let parents = [y_node, gamma_node, beta_node];
        match epilogue {
            Epilogue::None => norm_act::<B, C, 3>(parents, y, norm, Epilogue::None),
            Epilogue::Relu => norm_act::<B, C, 3>(parents, y, norm, Epilogue::Relu),
            Epilogue::AddRelu { skip, readers } => {
                let ([y_node, gamma_node, beta_node], (skip, skip_node)) = (parents, skip.into_parts());
                let parents = [y_node, gamma_node, beta_node, skip_node];
                norm_act::<B, C, 4>(parents, y, norm, Epilogue::AddRelu { skip, readers })
            }
        }
    }

    fn max_pool(x: FloatTensor<Self>, options: PoolOptions) -> FloatTensor<Self> {
        let (x, node) = x.into_parts();
        let out = B::max_pool(x.clone(), options);
        match Backward::<B, 1>::prepare::<C>(MaxPool, [node]).compute_bound().stateful() {
            OpsKind::Tracked(prep) => prep.finish(MaxPoolState { x, out: out.clone(), options }, out),
            OpsKind::UnTracked(prep) => prep.finish(out),
        }
    }

    fn mean_pool(x: FloatTensor<Self>) -> FloatTensor<Self> {
        let (x, node) = x.into_parts();
        let state = ([x.shape()[1], x.shape()[2]], x.dtype());
        let out = B::mean_pool(x);
        match Backward::<B, 1>::prepare::<C>(MeanPool, [node]).compute_bound().stateful() {
            OpsKind::Tracked(prep) => prep.finish(state, out),
            OpsKind::UnTracked(prep) => prep.finish(out),
        }
    }
}
