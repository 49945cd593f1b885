//! Updates and moving average on the CPU, by `byol-kernels`: one sweep over each tensor.

use burn::{
    backend::{Backend, Dispatch, Flex, backend_extension, flex::FlexTensor, tensor::FloatTensor},
    tensor::{Tensor, TensorData},
};
use byol_kernels::{
    isa,
    optimizer_step::{self, Adam, Momentum, ParamTensors, UpdatedTensors},
};

use super::{
    adamw::AdamW,
    lars::Lars,
    rule::{Rule, Update},
    sgd::Sgd,
};

/// Sweeps over flat tensors. Not available on the autodiff backend: updates are not differentiated.
#[backend_extension(Flex)]
trait UpdateOps: Backend {
    /// A [`Momentum`] step, with the trust ratio of LARS if there is one. Returns w and m.
    fn momentum_step(
        w: FloatTensor<Self>,
        g: FloatTensor<Self>,
        m: FloatTensor<Self>,
        lars: Option<TrustRatio>,
        step: Momentum,
    ) -> (FloatTensor<Self>, FloatTensor<Self>);

    /// An [`Adam`] step. Returns w, m and v.
    fn adam_step(
        w: FloatTensor<Self>,
        g: FloatTensor<Self>,
        m: FloatTensor<Self>,
        v: FloatTensor<Self>,
        step: Adam,
    ) -> (FloatTensor<Self>, FloatTensor<Self>, FloatTensor<Self>);

    /// ξ + rate · (θ − ξ).
    fn ema(xi: FloatTensor<Self>, theta: FloatTensor<Self>, rate: f32) -> FloatTensor<Self>;
}

/// Parameters of LARS's trust ratio.
#[derive(Debug, Clone, Copy)]
struct TrustRatio {
    weight_decay: f64,
    trust_coefficient: f64,
    /// Learning rate that caps the adaptive rate, if clipped.
    cap: Option<f64>,
}

fn values(tensor: &FlexTensor) -> &[f32] {
    tensor.as_slice().expect("made contiguous on entry")
}

fn tensor(values: Vec<f32>) -> FlexTensor {
    let n = values.len();
    FlexTensor::from_data(TensorData::new(values, [n]))
}

impl UpdateOps for Flex {
    fn momentum_step(
        w: FlexTensor,
        g: FlexTensor,
        m: FlexTensor,
        lars: Option<TrustRatio>,
        step: Momentum,
    ) -> (FlexTensor, FlexTensor) {
        let [w, g, m] = [w, g, m].map(|t| t.to_contiguous());
        let (isa, t) = (isa::current(), ParamTensors { w: values(&w), g: values(&g), m: values(&m) });
        let trust_ratio = lars.map_or(step.trust_ratio, |TrustRatio { weight_decay, trust_coefficient, cap }| {
            optimizer_step::trust_ratio(isa, t.w, t.g, weight_decay, trust_coefficient, cap)
        });
        let UpdatedTensors { w, m, .. } = optimizer_step::momentum(isa, t, Momentum { trust_ratio, ..step });
        (tensor(w), tensor(m))
    }

    fn adam_step(
        w: FlexTensor,
        g: FlexTensor,
        m: FlexTensor,
        v: FlexTensor,
        step: Adam,
    ) -> (FlexTensor, FlexTensor, FlexTensor) {
        let [w, g, m, v] = [w, g, m, v].map(|t| t.to_contiguous());
        let t = ParamTensors { w: values(&w), g: values(&g), m: values(&m) };
        let UpdatedTensors { w, m, v } = optimizer_step::adam(isa::current(), t, values(&v), step);
        (tensor(w), tensor(m), tensor(v.expect("Adam has a second moment")))
    }

    fn ema(xi: FlexTensor, theta: FlexTensor, rate: f32) -> FlexTensor {
        let [xi, theta] = [xi, theta].map(|t| t.to_contiguous());
        tensor(optimizer_step::ema(isa::current(), values(&xi), values(&theta), rate))
    }
}

/// Equivalent of [`Rule::step`] for tensors on the CPU.
pub(super) fn step(
    rule: &Rule,
    w: Tensor<1>,
    g: Tensor<1>,
    slots: &[Tensor<1>],
    update: Update,
) -> (Tensor<1>, Vec<Tensor<1>>) {
    let Update { t, eta, excluded } = update;
    let slot = |i: usize| slots[i].clone().into_dispatch();
    let (w, g, eta32) = (w.into_dispatch(), g.into_dispatch(), eta as f32);
    let decay = |weight_decay: f64| if excluded { 0.0 } else { weight_decay };
    let momentum_step = |momentum: f64, weight_decay: f64, nesterov: bool| Momentum {
        trust_ratio: 1.0,
        weight_decay: decay(weight_decay) as f32,
        momentum: momentum as f32,
        nesterov,
        eta: eta32,
    };
    let (lars, step) = match *rule {
        Rule::Adamw(AdamW { beta1, beta2, eps, weight_decay }) => {
            let step = Adam {
                beta: [beta1, beta2].map(|b| b as f32),
                one_minus_beta: [beta1, beta2].map(|b| (1.0 - b) as f32),
                bias_correction: [beta1, beta2].map(|b| (1.0 - b.powf(t as f64)) as f32),
                eps: eps as f32,
                decay_factor: (1.0 - eta * decay(weight_decay)) as f32,
                eta: eta32,
            };
            let (w, m, v) = Dispatch::adam_step(w, g, slot(0), slot(1), step);
            return (Tensor::from_dispatch(w), vec![Tensor::from_dispatch(m), Tensor::from_dispatch(v)]);
        }
        Rule::Lars(Lars { momentum, weight_decay, trust_coefficient, clip_lr }) => {
            let cap = clip_lr.then_some(eta.max(1e-12));
            let lars = (!excluded).then_some(TrustRatio { weight_decay, trust_coefficient, cap });
            (lars, momentum_step(momentum, weight_decay, false))
        }
        Rule::Sgd(Sgd { momentum, weight_decay, nesterov }) => (None, momentum_step(momentum, weight_decay, nesterov)),
    };
    let (w, m) = Dispatch::momentum_step(w, g, slot(0), lars, step);
    (Tensor::from_dispatch(w), vec![Tensor::from_dispatch(m)])
}

/// ξ + (1 − τ)(θ − ξ) for tensors on the CPU.
pub(super) fn ema(xi: Tensor<1>, theta: Tensor<1>, tau: f64) -> Tensor<1> {
    Tensor::from_dispatch(Dispatch::ema(xi.into_dispatch(), theta.into_dispatch(), (1.0 - tau) as f32))
}
