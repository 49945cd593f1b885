//! The projector g and the predictor q. "This MLP consists in a linear layer with output size 4096 followed by batch
//! normalization, rectified linear units, and a final linear layer with output dimension 256" (arXiv:2006.07733 §3.2). The first
//! layer has a bias, the second has none; the output is not normalised.

use burn::tensor::{Device, FloatDType, Tensor, activation::relu};

use super::{
    Init,
    fused::{self, Options, Source},
    init,
    pass::{Pass, Statistics},
    tree::{Leaf, Tree},
};
use crate::{
    device::has_kernels,
    random::{self, Domain},
};

/// Linear → batch norm → ReLU → Linear: the description, without weights.
#[derive(Debug, Clone, PartialEq)]
pub struct Mlp {
    /// Prefix of the parameters' names: `projector`.
    pub name: &'static str,
    /// Input length.
    pub d_in: usize,
    /// Length of the hidden layer.
    pub hidden: usize,
    /// Output length.
    pub d_out: usize,
    /// How the weights are drawn.
    pub init: Init,
}

impl Mlp {
    /// Names and shapes of all parameters. Linear weights are `[out, in]`.
    pub fn shapes(&self) -> Vec<(String, Vec<usize>)> {
        let name = |tail: &str| format!("{}.{tail}", self.name);
        vec![
            (name("fc1.weight"), vec![self.hidden, self.d_in]),
            (name("fc1.bias"), vec![self.hidden]),
            (name("bn.weight"), vec![self.hidden]),
            (name("bn.bias"), vec![self.hidden]),
            (name("fc2.weight"), vec![self.d_out, self.hidden]),
        ]
    }

    /// Fresh weights.
    pub fn init(&self, seed: u64, who: &str, device: &Device) -> Tree {
        let mut tree = Tree::new();
        for (name, shape) in self.shapes() {
            let n: usize = shape.iter().product();
            let mut rng = random::named_stream(Domain::Weights, seed, &format!("{who}.{name}"));
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

    /// Running statistics that have seen nothing.
    pub fn statistics(&self, device: &Device) -> Statistics {
        Statistics::new([(self.norm_name().as_str(), self.hidden)], device)
    }

    /// # Shapes
    /// `x`: `[N, d_in]`; returns `[N, d_out]`.
    pub fn forward(&self, pass: &mut Pass, x: Tensor<2>) -> Tensor<2> {
        if has_kernels(&x.device()) && pass.trains() {
            return self.fused(pass, x);
        }
        let linear = |pass: &Pass, x: Tensor<2>, tail: &str| {
            let w = pass.params.get::<2>(&format!("{}.{tail}", self.name)).transpose();
            pass.operand(x).matmul(pass.operand(w)).cast(FloatDType::F32)
        };
        let bias = pass.params.get::<1>(&format!("{}.fc1.bias", self.name));
        let h = linear(pass, x, "fc1.weight") + bias.reshape([1, self.hidden]);
        let h = relu(pass.batch_norm(&self.norm_name(), h));
        linear(pass, h, "fc2.weight")
    }

    /// The same in training by the CPU's kernels: a linear layer is a convolution of maps of one pixel.
    fn fused(&self, pass: &mut Pass, x: Tensor<2>) -> Tensor<2> {
        let (n, norm) = (x.dims()[0], self.norm_name());
        let weight = |pass: &Pass, tail: &str, c_out: usize, c_in: usize| {
            pass.params.get::<2>(&format!("{}.{tail}", self.name)).reshape([c_out, c_in, 1, 1])
        };
        let get = |name: String| pass.params.get::<1>(&name);
        let bias = get(format!("{}.fc1.bias", self.name));
        let (gamma, beta) = (get(format!("{norm}.weight")), get(format!("{norm}.bias")));
        // The norm takes the batch's mean away, and with it the bias, which moves the running mean and has a gradient of 0.
        let beta = beta + bias.clone().mul_scalar(0.0);
        let x = Source::Done(x.reshape([n, 1, 1, self.d_in]));
        let w = weight(pass, "fc1.weight", self.hidden, self.d_in);
        let h = fused::conv(x, w, gamma, beta, Options::dense(pass), pass.norm.eps);
        pass.saw(&norm, h.mean.clone() + bias, h.variance.clone());
        let w = weight(pass, "fc2.weight", self.d_out, self.hidden);
        fused::conv_alone(Source::Pending(h), w, Options::dense(pass)).reshape([n, self.d_out])
    }

    fn norm_name(&self) -> String {
        format!("{}.bn", self.name)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parameter_counts_are_the_published_ones() {
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
