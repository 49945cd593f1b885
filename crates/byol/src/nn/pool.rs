//! Pooling of maps `[N, H, W, C]`: by the CPU's kernels where there are some, else of Burn's own operations.

use burn::tensor::{FloatDType, Tensor, module::max_pool2d, ops::MaxPoolOptions};

use super::fused;
use crate::device::has_kernels;

/// The largest value of each 3x3 window, every second one. Padding never wins.
///
/// # Shapes
/// `x`: `[N, H, W, C]`; returns `[N, ⌊(H − 1) / 2⌋ + 1, …, C]`.
pub fn max_3x3_stride_2(x: Tensor<4>) -> Tensor<4> {
    if has_kernels(&x.device()) {
        return fused::max_pool(x, 3, 2, 1);
    }
    let options = MaxPoolOptions::new([3, 3]).with_stride([2, 2]).with_padding([1, 1]);
    max_pool2d(x.permute([0, 3, 1, 2]), options).permute([0, 2, 3, 1])
}

/// The mean of each map, in f32.
///
/// # Shapes
/// `x`: `[N, H, W, C]`, of any precision; returns `[N, C]`.
pub fn mean(x: Tensor<4>) -> Tensor<2> {
    if has_kernels(&x.device()) {
        return fused::mean(x);
    }
    let [n, _, _, c] = x.dims();
    x.cast(FloatDType::F32).mean_dim(1).mean_dim(2).reshape([n, c])
}
