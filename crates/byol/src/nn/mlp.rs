//! The projector g and the predictor q. "This MLP consists in a linear layer with output size 4096
//! followed by batch normalization, rectified linear units, and a final linear layer with output
//! dimension 256" (arXiv:2006.07733 §3.2). The first layer has a bias, the second has none; the
//! output is not normalized.

use burn::tensor::{Device, FloatDType, Tensor, activation::relu};

use super::{
    cpu::{self, ConvOptions, Epilogue, Norm},
    forward_context::{ForwardContext, Mode, RunningStats, Statistics},
    init::{self, Init},
    tree::{Leaf, Tree},
};
use crate::{
    device::has_kernels,
    random::{self, Domain},
};

/// Linear → batch norm → ReLU → linear: the description, without weights.
#[derive(Debug, Clone, PartialEq)]
pub struct Mlp {
    /// Prefix of the parameter names: `projector`.
    pub name: &'static str,
    /// Input length.
    pub d_in: usize,
    /// Length of the hidden layer.
    pub hidden: usize,
    /// Output length.
    pub d_out: usize,
    /// Initialization scheme.
    pub init: Init,
}

impl Mlp {
    /// Names and shapes of all parameters. Linear weights are `[out, in]`.
    pub fn shapes(&self) -> Vec<(String, Vec<usize>)> {
        let name = |suffix: &str| format!("{}.{suffix}", self.name);
        vec![
            (name("fc1.weight"), vec![self.hidden, self.d_in]),
            (name("fc1.bias"), vec![self.hidden]),
            (name("bn.weight"), vec![self.hidden]),
            (name("bn.bias"), vec![self.hidden]),
            (name("fc2.weight"), vec![self.d_out, self.hidden]),
        ]
    }

    /// Draws initial weights. `role` (`online` or `target`) selects the random streams.
    pub fn init(&self, seed: u64, role: &str, device: &Device) -> Tree {
        let mut tree = Tree::new();
        for (name, shape) in self.shapes() {
            let n: usize = shape.iter().product();
            let mut rng = random::named_stream(Domain::Weights, seed, &format!("{role}.{name}"));
            let values = match (shape.as_slice(), self.init) {
                ([_, d_in], Init::Reference) => init::truncated_normal(&mut rng, n, *d_in),
                ([_, d_in], Init::Torch) => init::torch_linear(&mut rng, n, *d_in),
                _ if name.ends_with("fc1.bias") && self.init == Init::Torch => {
                    init::torch_linear(&mut rng, n, self.d_in)
                }
                _ => vec![if name.ends_with("bn.weight") { 1.0 } else { 0.0 }; n],
            };
            tree.insert(name, Leaf::new(values, &shape, device));
        }
        tree
    }

    /// Initial running statistics.
    pub fn statistics(&self, device: &Device) -> Statistics {
        Statistics::new([(self.norm_name().as_str(), self.hidden)], device)
    }

    /// Applies the MLP.
    ///
    /// # Shapes
    /// `x`: `[N, d_in]`; returns `[N, d_out]`.
    pub fn forward(&self, ctx: &mut ForwardContext, x: Tensor<2>) -> Tensor<2> {
        let weight = ctx.params.get::<2>(&format!("{}.weight", self.layer(1)));
        let is_constant = !x.is_autodiff() && !weight.is_autodiff();
        match &ctx.mode {
            Mode::Train(..) if has_kernels(&x.device()) => return self.forward_fused(ctx, x),
            Mode::Eval(statistics) if has_kernels(&x.device()) && is_constant => {
                let running = statistics.get(&self.norm_name()).clone();
                return self.forward_folded(ctx, x, running);
            }
            _ => {}
        }
        let linear = |ctx: &ForwardContext, x: Tensor<2>, suffix: &str| {
            let w = ctx.params.get::<2>(&format!("{}.{suffix}", self.name)).transpose();
            ctx.to_compute_precision(x).matmul(ctx.to_compute_precision(w)).cast(FloatDType::F32)
        };
        let bias = ctx.params.get::<1>(&format!("{}.fc1.bias", self.name));
        let h = linear(ctx, x, "fc1.weight") + bias.reshape([1, self.hidden]);
        let h = relu(ctx.batch_norm(&self.norm_name(), h));
        linear(ctx, h, "fc2.weight")
    }

    /// Training on the CPU: a linear layer is a convolution of maps of one pixel.
    fn forward_fused(&self, ctx: &mut ForwardContext, x: Tensor<2>) -> Tensor<2> {
        let (n, norm_name) = (x.dims()[0], self.norm_name());
        let (bias, Norm { gamma, beta, eps }) = self.bias_and_norm(ctx);
        // The norm cancels the bias, which affects only the running mean. Its gradient is 0.
        let norm = Norm { gamma, beta: beta + bias.clone().mul_scalar(0.0), eps };
        let x = x.reshape([n, 1, 1, self.d_in]);
        let h = cpu::conv_norm(x.into(), ctx.weight(&self.layer(1)), norm, ConvOptions::new(ctx));
        ctx.update_running_stats(&norm_name, h.mean.clone() + bias, h.variance.clone());
        cpu::conv(h.into(), ctx.weight(&self.layer(2)), ConvOptions::new(ctx)).reshape([n, self.d_out])
    }

    /// Evaluation on the CPU, with the norm folded into the first layer.
    fn forward_folded(&self, ctx: &mut ForwardContext, x: Tensor<2>, running: RunningStats) -> Tensor<2> {
        let (n, options) = (x.dims()[0], ConvOptions::new(ctx));
        let (bias, norm) = self.bias_and_norm(ctx);
        // norm(x Wᵀ + b) is a norm of x Wᵀ with another mean.
        let running = RunningStats { mean: running.mean - bias, ..running };
        let x = x.reshape([n, 1, 1, self.d_in]);
        let h = cpu::folded(x, ctx.weight(&self.layer(1)).tensor, norm, &running, Epilogue::Relu, options);
        cpu::conv(h.into(), ctx.weight(&self.layer(2)), options).reshape([n, self.d_out])
    }

    /// Bias of the first layer and the norm that follows.
    fn bias_and_norm(&self, ctx: &ForwardContext) -> (Tensor<1>, Norm) {
        let get = |name: String| ctx.params.get::<1>(&name);
        let [gamma, beta] = ["weight", "bias"].map(|suffix| get(format!("{}.{suffix}", self.norm_name())));
        (get(format!("{}.bias", self.layer(1))), Norm { gamma, beta, eps: ctx.norm.eps })
    }

    fn layer(&self, i: usize) -> String {
        format!("{}.fc{i}", self.name)
    }

    fn norm_name(&self) -> String {
        format!("{}.bn", self.name)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parameter_counts_match_the_paper() {
        let count = |d_in| {
            let mlp = Mlp { name: "projector", d_in, hidden: 4096, d_out: 256, init: Init::Reference };
            mlp.shapes().iter().map(|(_, s)| s.iter().product::<usize>()).sum::<usize>()
        };
        assert_eq!(count(512), 3_158_016);
        assert_eq!(count(2048), 9_449_472);
        assert_eq!(count(4096), 17_838_080);
        assert_eq!(count(256), 2_109_440, "the predictor");
    }
}
