//! The update of one tensor on the CPU, computed by `byol-kernels` in one sweep: the rule's formula and the average's.

use burn::{
    backend::{
        Autodiff, Backend, Dispatch, Flex, autodiff::checkpoint::strategy::CheckpointStrategy, backend_extension,
        flex::FlexTensor, tensor::FloatTensor,
    },
    tensor::{Tensor, TensorData},
};
use byol_kernels::{
    isa,
    update::{self, Adam, Momentum, Moved, Tensors},
};

use super::{AdamW, Lars, Moves, Rule, Sgd};

/// The sweeps on one backend. `xi` counts where `followed`; else what is returned for it is empty.
#[backend_extension(Autodiff, Flex)]
trait Sweep: Backend {
    /// ‖w‖ and ‖g + decay · w‖ make LARS's ratio; then [`Momentum`]: (w, m, ξ).
    fn momentum(
        w: FloatTensor<Self>,
        g: FloatTensor<Self>,
        m: FloatTensor<Self>,
        xi: FloatTensor<Self>,
        followed: bool,
        trust: Option<Trust>,
        by: Momentum,
    ) -> (FloatTensor<Self>, FloatTensor<Self>, FloatTensor<Self>);

    /// [`Adam`]: (w, m, v, ξ).
    fn adam(
        w: FloatTensor<Self>,
        g: FloatTensor<Self>,
        m: FloatTensor<Self>,
        v: FloatTensor<Self>,
        xi: FloatTensor<Self>,
        followed: bool,
        by: Adam,
    ) -> (FloatTensor<Self>, FloatTensor<Self>, FloatTensor<Self>, FloatTensor<Self>);
}

/// LARS's trust coefficient, and its cap.
#[derive(Debug, Clone, Copy)]
pub(super) struct Trust {
    decay: f64,
    trust: f64,
    cap: Option<f64>,
}

fn values(tensor: &FlexTensor) -> &[f32] {
    tensor.as_slice().expect("made contiguous on entry")
}

fn tensor(values: Vec<f32>) -> FlexTensor {
    let n = values.len();
    FlexTensor::from_data(TensorData::new(values, [n]))
}

impl Sweep for Flex {
    fn momentum(
        w: FlexTensor,
        g: FlexTensor,
        m: FlexTensor,
        xi: FlexTensor,
        followed: bool,
        trust: Option<Trust>,
        by: Momentum,
    ) -> (FlexTensor, FlexTensor, FlexTensor) {
        let [w, g, m, xi] = [w, g, m, xi].map(|t| t.to_contiguous());
        let (isa, xi) = (isa::chosen(), followed.then(|| values(&xi)));
        let t = Tensors { w: values(&w), g: values(&g), m: values(&m), xi };
        let ratio =
            trust.map_or(by.ratio, |Trust { decay, trust, cap }| update::lars_ratio(isa, t.w, t.g, decay, trust, cap));
        let Moved { w, m, xi, .. } = update::momentum(isa, t, Momentum { ratio, ..by });
        (tensor(w), tensor(m), tensor(xi.unwrap_or_default()))
    }

    fn adam(
        w: FlexTensor,
        g: FlexTensor,
        m: FlexTensor,
        v: FlexTensor,
        xi: FlexTensor,
        followed: bool,
        by: Adam,
    ) -> (FlexTensor, FlexTensor, FlexTensor, FlexTensor) {
        let [w, g, m, v, xi] = [w, g, m, v, xi].map(|t| t.to_contiguous());
        let t = Tensors { w: values(&w), g: values(&g), m: values(&m), xi: followed.then(|| values(&xi)) };
        let Moved { w, m, v, xi } = update::adam(isa::chosen(), t, values(&v), by);
        (tensor(w), tensor(m), tensor(v.unwrap_or_default()), tensor(xi.unwrap_or_default()))
    }
}

impl<B: Backend + Sweep, C: CheckpointStrategy> Sweep for Autodiff<B, C> {
    fn momentum(
        _: FloatTensor<Self>,
        _: FloatTensor<Self>,
        _: FloatTensor<Self>,
        _: FloatTensor<Self>,
        _: bool,
        _: Option<Trust>,
        _: Momentum,
    ) -> (FloatTensor<Self>, FloatTensor<Self>, FloatTensor<Self>) {
        panic!("an update is not differentiated")
    }

    fn adam(
        _: FloatTensor<Self>,
        _: FloatTensor<Self>,
        _: FloatTensor<Self>,
        _: FloatTensor<Self>,
        _: FloatTensor<Self>,
        _: bool,
        _: Adam,
    ) -> (FloatTensor<Self>, FloatTensor<Self>, FloatTensor<Self>, FloatTensor<Self>) {
        panic!("an update is not differentiated")
    }
}

/// One tensor by a rule, and what follows it: (w, the rule's slots, ξ). All flat; a device that has kernels.
pub(super) fn step(
    rule: &Rule,
    w: Tensor<1>,
    g: Tensor<1>,
    slots: &[Tensor<1>],
    xi: Option<Tensor<1>>,
    moves: Moves,
) -> (Tensor<1>, Vec<Tensor<1>>, Option<Tensor<1>>) {
    let Moves { t, eta, tau, excluded } = moves;
    let followed = xi.is_some();
    let xi = xi.unwrap_or_else(|| Tensor::zeros([1], &w.device()));
    let slot = |i: usize| slots[i].clone().into_dispatch();
    let (w, g, xi) = (w.into_dispatch(), g.into_dispatch(), xi.into_dispatch());
    let back = |xi| followed.then(|| Tensor::from_dispatch(xi));
    let (eta32, follow) = (eta as f32, (1.0 - tau) as f32);
    let decay_of = |decay: f64| if excluded { 0.0 } else { decay };
    let by_momentum = |momentum: f64, decay: f64, nesterov: bool| Momentum {
        ratio: 1.0,
        decay: decay_of(decay) as f32,
        momentum: momentum as f32,
        nesterov,
        eta: eta32,
        follow,
    };
    let (trust, by) = match *rule {
        Rule::Adamw(AdamW { beta1, beta2, eps, weight_decay }) => {
            let by = Adam {
                beta: [beta1, beta2].map(|b| b as f32),
                rest: [beta1, beta2].map(|b| (1.0 - b) as f32),
                correction: [beta1, beta2].map(|b| (1.0 - b.powf(t as f64)) as f32),
                eps: eps as f32,
                keep: (1.0 - eta * decay_of(weight_decay)) as f32,
                eta: eta32,
                follow,
            };
            let (w, m, v, xi) = Dispatch::adam(w, g, slot(0), slot(1), xi, followed, by);
            return (Tensor::from_dispatch(w), vec![Tensor::from_dispatch(m), Tensor::from_dispatch(v)], back(xi));
        }
        Rule::Lars(Lars { momentum, weight_decay, trust, clip_lr }) => {
            let cap = clip_lr.then_some(eta.max(1e-12));
            let trust = (!excluded).then_some(Trust { decay: weight_decay, trust, cap });
            (trust, by_momentum(momentum, weight_decay, false))
        }
        Rule::Sgd(Sgd { momentum, weight_decay, nesterov }) => (None, by_momentum(momentum, weight_decay, nesterov)),
    };
    let (w, m, xi) = Dispatch::momentum(w, g, slot(0), xi, followed, trust, by);
    (Tensor::from_dispatch(w), vec![Tensor::from_dispatch(m)], back(xi))
}
