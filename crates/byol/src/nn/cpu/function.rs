//! Differentiable functions of one tensor, on slices: operations too small for a kernel. Composed
//! of Burn's operations, each would take several passes over strided views.

// `#[backend_extension]` needs the result types spelled out.
#![allow(clippy::type_complexity)]

use std::{fmt::Debug, sync::Arc};

use burn::{
    backend::{
        Autodiff, Backend, Dispatch, Flex, TensorMetadata,
        autodiff::{
            checkpoint::{base::Checkpointer, strategy::CheckpointStrategy},
            grads::Gradients,
            ops::{Backward, Ops, OpsKind},
        },
        backend_extension,
        flex::FlexTensor,
        tensor::FloatTensor,
    },
    tensor::Tensor,
};

use super::ops::{tensor, values};

/// A function of the elements of a tensor, row-major, with its gradient.
pub(crate) trait Function: Debug + Send + Sync {
    /// y.
    fn forward(&self, x: &[f32]) -> Vec<f32>;

    /// dx from dy.
    fn backward(&self, dy: &[f32]) -> Vec<f32>;
}

/// A loss whose gradient is computed with its value.
#[derive(Debug)]
struct KnownGradient {
    value: f32,
    gradient: Vec<f32>,
}

impl Function for KnownGradient {
    fn forward(&self, _: &[f32]) -> Vec<f32> {
        vec![self.value]
    }

    fn backward(&self, dy: &[f32]) -> Vec<f32> {
        self.gradient.iter().map(|g| g * dy[0]).collect()
    }
}

#[backend_extension(Autodiff, Flex)]
trait FunctionOps: Backend {
    /// f(x), of this shape.
    fn apply(x: FloatTensor<Self>, f: Arc<dyn Function>, shape: Vec<usize>) -> FloatTensor<Self>;
}

impl FunctionOps for Flex {
    fn apply(x: FlexTensor, f: Arc<dyn Function>, shape: Vec<usize>) -> FlexTensor {
        tensor(f.forward(values(&x.to_contiguous())), &shape)
    }
}

/// Backward passes, only for Flex: second derivatives are not supported.
trait FunctionGrads: FunctionOps {
    fn apply_backward(dy: FloatTensor<Self>, f: &dyn Function, shape: Vec<usize>) -> FloatTensor<Self>;
}

impl FunctionGrads for Flex {
    fn apply_backward(dy: FlexTensor, f: &dyn Function, shape: Vec<usize>) -> FlexTensor {
        tensor(f.backward(values(&dy.to_contiguous())), &shape)
    }
}

#[derive(Debug)]
struct Apply;

impl<B: FunctionGrads> Backward<B, 1> for Apply {
    /// The function and the shape of x.
    type State = (Arc<dyn Function>, Vec<usize>);

    fn backward(self, ops: Ops<Self::State, 1>, grads: &mut Gradients, _: &mut Checkpointer) {
        let dy = grads.consume::<B>(&ops.node);
        if let [Some(node)] = ops.parents {
            let (f, shape) = ops.state;
            grads.register::<B>(node.id, B::apply_backward(dy, &*f, shape));
        }
    }
}

impl<B: FunctionGrads, C: CheckpointStrategy> FunctionOps for Autodiff<B, C> {
    fn apply(x: FloatTensor<Self>, f: Arc<dyn Function>, shape: Vec<usize>) -> FloatTensor<Self> {
        let (x, node) = x.into_parts();
        let x_shape = x.shape().to_vec();
        let y = B::apply(x, f.clone(), shape);
        match Backward::<B, 1>::prepare::<C>(Apply, [node]).compute_bound().stateful() {
            OpsKind::Tracked(prep) => prep.finish((f, x_shape), y),
            OpsKind::UnTracked(prep) => prep.finish(y),
        }
    }
}

/// f(x), of the given shape. `x` is f32 on the CPU.
pub(crate) fn apply<const D: usize, const E: usize>(
    x: Tensor<D>,
    f: impl Function + 'static,
    shape: [usize; E],
) -> Tensor<E> {
    Tensor::from_dispatch(Dispatch::apply(x.into_dispatch(), Arc::new(f), shape.to_vec()))
}

/// A loss, `[1]`, from its value and its gradient at x.
pub(crate) fn loss<const D: usize>(x: Tensor<D>, value: f64, gradient: Vec<f32>) -> Tensor<1> {
    apply(x, KnownGradient { value: value as f32, gradient }, [1])
}
