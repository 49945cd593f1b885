//! θ and ξ as values: an ordered map from a parameter's name to its tensor.
//!
//! The reference keeps parameters in a tree of its own, apart from the functions that use them, and so do we: a
//! network is a description (`ResNet`, `Mlp`) plus a [`Tree`]. So the moving average of the paper is one line over two
//! trees, an optimiser is a function of two flat vectors, and a checkpoint is the tree written down.

use burn::tensor::{Device, Gradients, Tensor, TensorData};
use indexmap::IndexMap;

/// One named tensor. Stored flat; [`Tree::get`] gives it its shape back (a view, no copy).
#[derive(Debug, Clone)]
pub struct Leaf {
    /// Row-major shape; its product is the length of `value`.
    pub shape: Vec<usize>,
    /// The elements, `[shape.product()]`, f32.
    pub value: Tensor<1>,
}

impl Leaf {
    /// A leaf from host values.
    pub fn new(values: Vec<f32>, shape: &[usize], device: &Device) -> Self {
        assert_eq!(values.len(), shape.iter().product::<usize>(), "a leaf's length is the product of its shape");
        let n = values.len();
        Leaf { shape: shape.to_vec(), value: Tensor::from_data(TensorData::new(values, [n]), device) }
    }

    /// The elements on the host.
    pub fn to_vec(&self) -> Vec<f32> {
        host(self.value.clone())
    }
}

/// The elements of a tensor on the host, row-major.
pub fn host<const D: usize>(tensor: Tensor<D>) -> Vec<f32> {
    tensor.without_autodiff().into_data_as::<f32>().try_into_vec::<f32>().expect("float tensors are read back as f32")
}

/// An ordered map from torchvision's parameter names to tensors: a whole set of weights.
#[derive(Debug, Clone, Default)]
pub struct Tree(IndexMap<String, Leaf>);

impl Tree {
    /// A tree without leaves.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds or replaces a leaf.
    pub fn insert(&mut self, name: impl Into<String>, leaf: Leaf) {
        self.0.insert(name.into(), leaf);
    }

    /// The leaf of that name.
    pub fn leaf(&self, name: &str) -> Option<&Leaf> {
        self.0.get(name)
    }

    /// The tensor of that name in its own shape.
    ///
    /// # Panics
    /// If there is none, or its rank is not `D`: a network description that asks for a weight it did not declare is a
    /// bug of ours. Weights from a file are checked against the description before they get here (`nn::weights`).
    pub fn get<const D: usize>(&self, name: &str) -> Tensor<D> {
        let leaf = self.0.get(name).unwrap_or_else(|| panic!("no parameter named {name}"));
        let shape: [usize; D] =
            leaf.shape.as_slice().try_into().unwrap_or_else(|_| panic!("{name} is not of rank {D}"));
        leaf.value.clone().reshape(shape)
    }

    /// Leaves in their order.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = (&str, &Leaf)> {
        self.0.iter().map(|(name, leaf)| (name.as_str(), leaf))
    }

    /// How many leaves.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// How many numbers all leaves hold.
    pub fn n_parameters(&self) -> usize {
        self.0.values().map(|leaf| leaf.shape.iter().product::<usize>()).sum()
    }

    /// The same names and shapes, each value through `f(name, value)`.
    pub fn map(&self, mut f: impl FnMut(&str, Tensor<1>) -> Tensor<1>) -> Tree {
        let leaf = |(name, leaf): (&String, &Leaf)| {
            (name.clone(), Leaf { shape: leaf.shape.clone(), value: f(name, leaf.value.clone()) })
        };
        Tree(self.0.iter().map(leaf).collect())
    }

    /// `f(name, self's value, other's value)` leaf by leaf, by name; leaves that `other` lacks are an error of ours.
    pub fn zip(&self, other: &Tree, mut f: impl FnMut(&str, Tensor<1>, Tensor<1>) -> Tensor<1>) -> Tree {
        self.map(|name, a| {
            let b = other.leaf(name).unwrap_or_else(|| panic!("no leaf named {name} in the other tree"));
            f(name, a, b.value.clone())
        })
    }

    /// The leaves whose names begin with `prefix`, with the prefix cut off.
    pub fn under(&self, prefix: &str) -> Tree {
        let cut = |(name, leaf): (&String, &Leaf)| Some((name.strip_prefix(prefix)?.to_owned(), leaf.clone()));
        Tree(self.0.iter().filter_map(cut).collect())
    }

    /// All leaves of `other`, each name behind `prefix`.
    pub fn extend(&mut self, prefix: &str, other: &Tree) {
        for (name, leaf) in other.iter() {
            self.insert(format!("{prefix}{name}"), leaf.clone());
        }
    }

    /// The same values as leaves of an autodiff graph: gradients will be kept for each.
    pub fn tracked(&self) -> Tree {
        self.map(|_, value| value.autodiff().require_grad())
    }

    /// The gradients of the leaves of a [`Tree::tracked`] tree, without autodiff. A leaf that the loss did not reach has
    /// gradient 0.
    pub fn gradients(&self, gradients: &mut Gradients) -> Tree {
        self.map(|_, value| match value.grad_remove(gradients) {
            Some(g) => g,
            None => value.without_autodiff().zeros_like(),
        })
    }

    /// The same names, shapes and device, with these values, leaf after leaf.
    pub fn with_values(&self, values: &[f32]) -> Tree {
        assert_eq!(values.len(), self.n_parameters(), "as many values as the tree has");
        let mut rest = values;
        self.map(|_, old| {
            let (own, others) = rest.split_at(old.dims()[0]);
            rest = others;
            Tensor::from_data(TensorData::new(own.to_vec(), [own.len()]), &old.device())
        })
    }

    /// Root of the sum of squares of all leaves, in f64 on the host. For reports, not for the update.
    pub fn norm(&self) -> f64 {
        if self.is_empty() {
            return 0.0;
        }
        // Read back together: a device works on its own until somebody waits for it.
        let squares = self.0.values().map(|leaf| leaf.value.clone().square().sum()).collect();
        host(Tensor::cat(squares, 0)).into_iter().map(f64::from).sum::<f64>().sqrt()
    }
}
