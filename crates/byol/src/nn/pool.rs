//! Pooling of maps `[N, H, W, C]`, by the kernels of the CPU or by Burn's operations.

use burn::tensor::{FloatDType, Tensor, module::max_pool2d, ops::MaxPoolOptions};

use super::cpu::{self, PoolOptions};
use crate::device::has_kernels;

/// Max pool with 3×3 windows and stride 2. Padding never is the maximum.
///
/// # Shapes
/// `x`: `[N, H, W, C]`; returns `[N, ⌊(H − 1) / 2⌋ + 1, …, C]`.
pub(crate) fn max_3x3_stride_2(x: Tensor<4>) -> Tensor<4> {
    if has_kernels(&x.device()) {
        return cpu::max_pool(x, PoolOptions { kernel: 3, stride: 2, padding: 1 });
    }
    let options = MaxPoolOptions::new([3, 3]).with_stride([2, 2]).with_padding([1, 1]);
    max_pool2d(x.permute([0, 3, 1, 2]), options).permute([0, 2, 3, 1])
}

/// Global average pool, in f32.
///
/// # Shapes
/// `x`: `[N, H, W, C]`, in any precision; returns `[N, C]`.
pub fn mean(x: Tensor<4>) -> Tensor<2> {
    if has_kernels(&x.device()) {
        return cpu::mean_pool(x);
    }
    let [n, _, _, c] = x.dims();
    x.cast(FloatDType::F32).mean_dim(1).mean_dim(2).reshape([n, c])
}
