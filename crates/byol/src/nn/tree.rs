//! Named parameter tensors: θ and ξ as values.
//!
//! As in the JAX reference, parameters are kept apart from the functions that use them: a network
//! is a description (`ResNet`, `Mlp`) plus a [`Tree`]. The paper's moving average is then one line
//! over two trees, an optimizer is a function of flat vectors, and a checkpoint is the tree on
//! disk.

use burn::tensor::{Device, Gradients, Tensor, TensorData};
use indexmap::IndexMap;
use rayon::prelude::*;

use crate::{device::has_kernels, ranks::Ranks};

/// One named tensor. Stored flat; [`Tree::get`] restores its shape (a view, no copy).
#[derive(Debug, Clone)]
pub struct Leaf {
    /// Row-major shape; its product is the length of `value`.
    pub shape: Vec<usize>,
    /// The elements, `[shape.product()]`, f32.
    pub value: Tensor<1>,
}

impl Leaf {
    /// Creates a leaf from host values.
    ///
    /// # Panics
    /// If the number of values is not the product of `shape`.
    pub fn new(values: Vec<f32>, shape: &[usize], device: &Device) -> Self {
        assert_eq!(values.len(), shape.iter().product::<usize>(), "a leaf's length is the product of its shape");
        let n = values.len();
        Leaf { shape: shape.to_vec(), value: Tensor::from_data(TensorData::new(values, [n]), device) }
    }

    /// Copies the elements to the host.
    pub fn to_vec(&self) -> Vec<f32> {
        host(self.value.clone())
    }
}

/// Copies the elements of a tensor to the host, row-major.
pub fn host<const D: usize>(tensor: Tensor<D>) -> Vec<f32> {
    tensor.without_autodiff().into_data_as::<f32>().try_into_vec::<f32>().expect("float tensors are read back as f32")
}

/// Changes the elements of a tensor on the host.
fn on_host(tensor: Tensor<1>, f: impl FnOnce(&mut [f32])) -> Tensor<1> {
    let (device, n) = (tensor.device(), tensor.dims()[0]);
    let mut values = host(tensor);
    f(&mut values);
    Tensor::from_data(TensorData::new(values, [n]), &device)
}

/// A set of weights: an ordered map from torchvision's parameter names to tensors.
#[derive(Debug, Clone, Default)]
pub struct Tree(IndexMap<String, Leaf>);

impl Tree {
    /// Creates an empty tree.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds or replaces a leaf.
    pub fn insert(&mut self, name: impl Into<String>, leaf: Leaf) {
        self.0.insert(name.into(), leaf);
    }

    /// Returns the leaf with this name.
    pub fn leaf(&self, name: &str) -> Option<&Leaf> {
        self.0.get(name)
    }

    /// Returns the tensor with this name in its own shape.
    ///
    /// # Panics
    /// If there is no such leaf, or its rank is not `D`: the network description would ask for a
    /// weight that it did not declare. Weights from a file are checked when they are loaded
    /// (`nn::weights`).
    pub fn get<const D: usize>(&self, name: &str) -> Tensor<D> {
        let leaf = self.0.get(name).unwrap_or_else(|| panic!("no parameter named {name}"));
        let shape: [usize; D] =
            leaf.shape.as_slice().try_into().unwrap_or_else(|_| panic!("{name} is not of rank {D}"));
        leaf.value.clone().reshape(shape)
    }

    /// Iterates over the leaves in their order.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = (&str, &Leaf)> {
        self.0.iter().map(|(name, leaf)| (name.as_str(), leaf))
    }

    /// Number of leaves.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Returns `true` if the tree has no leaves.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Number of elements in all leaves.
    pub fn n_parameters(&self) -> usize {
        self.0.values().map(|leaf| leaf.shape.iter().product::<usize>()).sum()
    }

    /// Returns a tree of the same names and shapes, with each value replaced by `f(name, value)`.
    pub fn map(&self, mut f: impl FnMut(&str, Tensor<1>) -> Tensor<1>) -> Tree {
        let leaf = |(name, leaf): (&String, &Leaf)| {
            (name.clone(), Leaf { shape: leaf.shape.clone(), value: f(name, leaf.value.clone()) })
        };
        Tree(self.0.iter().map(leaf).collect())
    }

    /// Combines two trees leaf by leaf: `f(name, self's value, other's value)`. Leaves that only
    /// `other` has are ignored.
    ///
    /// # Panics
    /// If `other` lacks a leaf of `self`.
    pub fn zip(&self, other: &Tree, mut f: impl FnMut(&str, Tensor<1>, Tensor<1>) -> Tensor<1>) -> Tree {
        self.map(|name, a| {
            let b = other.leaf(name).unwrap_or_else(|| panic!("no leaf named {name} in the other tree"));
            f(name, a, b.value.clone())
        })
    }

    /// Adds all leaves of `other`, with `prefix` prepended to their names.
    pub fn extend(&mut self, prefix: &str, other: &Tree) {
        for (name, leaf) in other.iter() {
            self.insert(format!("{prefix}{name}"), leaf.clone());
        }
    }

    /// Returns the values as leaves of an autodiff graph that keeps a gradient for each.
    pub fn tracked(&self) -> Tree {
        self.map(|_, value| value.autodiff().require_grad())
    }

    /// Takes the gradients of a [tracked](Tree::tracked) tree, without autodiff. The gradient of a
    /// leaf that the loss does not depend on is 0.
    pub fn gradients(&self, gradients: &mut Gradients) -> Tree {
        self.map(|_, value| match value.grad_remove(gradients) {
            Some(g) => g,
            None => value.without_autodiff().zeros_like(),
        })
    }

    /// Averages the tree over all ranks.
    pub(crate) fn all_reduce_mean(self, ranks: Ranks) -> Tree {
        if ranks == Ranks::SINGLE {
            return self;
        }
        let mut values = host(Tensor::cat(self.iter().map(|(_, leaf)| leaf.value.clone()).collect(), 0));
        ranks.all_reduce_mean(&mut values);
        self.with_values(&values)
    }

    /// Returns a tree of the same names, shapes and device with these values, leaf after leaf.
    ///
    /// # Panics
    /// If the number of values is not [`Tree::n_parameters`].
    pub(crate) fn with_values(&self, values: &[f32]) -> Tree {
        assert_eq!(values.len(), self.n_parameters(), "one value for each parameter");
        let mut rest = values;
        self.map(|_, old| {
            let (own, others) = rest.split_at(old.dims()[0]);
            rest = others;
            Tensor::from_data(TensorData::new(own.to_vec(), [own.len()]), &old.device())
        })
    }

    /// Returns the sum with another tree, leaf by leaf.
    ///
    /// # Panics
    /// If `other` lacks a leaf of `self`.
    pub(crate) fn add(&self, other: &Tree) -> Tree {
        self.zip(other, |_, a, b| match has_kernels(&a.device()) {
            true => {
                let b = host(b);
                on_host(a, |values| values.par_iter_mut().zip(&b).for_each(|(a, b)| *a += b))
            }
            false => a + b,
        })
    }

    /// Returns the tree divided by `n`.
    pub(crate) fn div(&self, n: f64) -> Tree {
        self.map(|_, a| match has_kernels(&a.device()) {
            true => on_host(a, |values| values.par_iter_mut().for_each(|a| *a /= n as f32)),
            false => a.div_scalar(n),
        })
    }

    /// L2 norm over all leaves. For statistics, not for the update. Not finite if the square of a
    /// value exceeds the range of f32, on every device.
    pub fn norm(&self) -> f64 {
        if self.is_empty() {
            return 0.0;
        }
        if self.0.values().all(|leaf| has_kernels(&leaf.value.device())) {
            let squares = |leaf: &Leaf| -> f64 { leaf.to_vec().iter().map(|v| f64::from(v * v)).sum() };
            return self.0.values().map(squares).sum::<f64>().sqrt();
        }
        // One transfer for all leaves: each would wait for the device.
        let squares = self.0.values().map(|leaf| leaf.value.clone().square().sum()).collect();
        host(Tensor::cat(squares, 0)).into_iter().map(f64::from).sum::<f64>().sqrt()
    }
}
