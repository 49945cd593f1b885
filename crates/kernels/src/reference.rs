//! Reference implementations for tests: scalar, in f64, with loops in the order of the formula.

use crate::{conv::Shape, pool::PoolShape};

/// Calls `f` with the indices into x, w and y of every product that a convolution sums.
pub fn for_each_product(s: &Shape, mut f: impl FnMut(usize, usize, usize)) {
    for n in 0..s.n {
        for oy in 0..s.h_out() {
            for ox in 0..s.w_out() {
                for o in 0..s.c_out {
                    for ky in 0..s.kernel {
                        for kx in 0..s.kernel {
                            let (y, x) = (oy * s.stride + ky * s.dilation, ox * s.stride + kx * s.dilation);
                            let inside = |v: usize, n: usize| v >= s.padding && v - s.padding < n;
                            if !inside(y, s.h) || !inside(x, s.w) {
                                continue;
                            }
                            for c in 0..s.c_in {
                                let from = ((n * s.h + y - s.padding) * s.w + x - s.padding) * s.c_in + c;
                                let weight = ((o * s.c_in + c) * s.kernel + ky) * s.kernel + kx;
                                let to = ((n * s.h_out() + oy) * s.w_out() + ox) * s.c_out + o;
                                f(from, weight, to);
                            }
                        }
                    }
                }
            }
        }
    }
}

/// Computes y, dx and dw of a convolution, given dy.
pub fn conv(s: &Shape, x: &[f32], w: &[f32], dy: &[f32]) -> [Vec<f64>; 3] {
    let mut all = [vec![0.0; dy.len()], vec![0.0; x.len()], vec![0.0; w.len()]];
    let [y, dx, dw] = &mut all;
    for_each_product(s, |i, k, o| {
        y[o] += f64::from(x[i]) * f64::from(w[k]);
        dx[i] += f64::from(dy[o]) * f64::from(w[k]);
        dw[k] += f64::from(dy[o]) * f64::from(x[i]);
    });
    all
}

/// Computes the output of a max pooling and dx, given dout. The gradient of a window goes to the
/// first pixel that holds its maximum.
pub fn max_pool(s: &PoolShape, x: &[f32], dout: &[f32]) -> [Vec<f64>; 2] {
    let (mut out, mut dx) = (Vec::new(), vec![0.0; x.len()]);
    for n in 0..s.n {
        for oy in 0..s.h_out() {
            for ox in 0..s.w_out() {
                for c in 0..s.c {
                    let mut best: Option<usize> = None;
                    for ky in 0..s.kernel {
                        for kx in 0..s.kernel {
                            let (y, x_) = (oy * s.stride + ky, ox * s.stride + kx);
                            let inside = |v: usize, n: usize| v >= s.padding && v - s.padding < n;
                            if inside(y, s.h) && inside(x_, s.w) {
                                let at = ((n * s.h + y - s.padding) * s.w + x_ - s.padding) * s.c + c;
                                if best.is_none_or(|b| x[at] > x[b]) {
                                    best = Some(at);
                                }
                            }
                        }
                    }
                    let best = best.expect("every window has a pixel");
                    dx[best] += f64::from(dout[out.len()]);
                    out.push(f64::from(x[best]));
                }
            }
        }
    }
    [out, dx]
}
