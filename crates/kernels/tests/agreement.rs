//! Fast = plain, over awkward shapes; and 1 thread = 3 threads, bit for bit.

use byol_kernels::{
    conv::{Input, Shape, backward_data, backward_weight, forward, forward_then},
    isa::{self, Isa},
    norm::{self, Gate, Norm, Pending},
    pool::{self, Windows},
    reference,
};

fn noise(n: usize, seed: u64) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    let mut next = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 40) as f32 / (1u64 << 24) as f32 - 0.5
    };
    (0..n).map(|_| next()).collect()
}

fn shapes() -> Vec<Shape> {
    let shape = |(n, h, w, c_in, c_out, kernel, stride, padding, dilation)| Shape {
        n,
        h,
        w,
        c_in,
        c_out,
        kernel,
        stride,
        padding,
        dilation,
    };
    [
        (1, 1, 1, 3, 5, 1, 1, 0, 1),
        (1, 1, 1, 3, 5, 3, 1, 1, 1),
        (1, 1, 1, 3, 4, 7, 2, 3, 1),
        (2, 5, 7, 3, 17, 3, 1, 1, 1),
        (3, 9, 8, 17, 5, 3, 2, 1, 1),
        (2, 6, 11, 16, 32, 1, 2, 0, 1),
        (5, 4, 4, 16, 8, 1, 1, 0, 1),
        (2, 7, 5, 20, 40, 1, 1, 0, 1),
        (2, 33, 29, 3, 6, 7, 2, 3, 1),
        (9, 4, 4, 33, 7, 3, 1, 1, 1),
        (1, 9, 11, 6, 19, 3, 1, 2, 2),
        (2, 11, 8, 5, 33, 3, 2, 2, 2),
        (1, 13, 12, 4, 3, 3, 3, 0, 1),
        (1, 10, 9, 2, 3, 2, 3, 0, 1),      // pixels of the input that no window meets
        (1, 40, 200, 40, 3, 3, 1, 1, 1),   // more than one task an image
        (1, 60, 90, 32, 5, 3, 2, 1, 1),    // the same with a stride
        (70, 2, 2, 5, 6, 3, 1, 1, 1),      // more than one task
        (3, 5, 4, 130, 72, 3, 1, 1, 1),    // weights that threads share
        (40, 14, 15, 150, 70, 3, 2, 1, 1), // the same, more than one group
        (2, 9, 8, 16, 16, 3, 1, 1, 1),     // Winograd: from here on
        (3, 5, 4, 17, 35, 3, 1, 1, 1),
        (1, 3, 7, 40, 16, 3, 1, 0, 1),
        (2, 6, 5, 16, 21, 3, 1, 2, 1),
        (150, 4, 4, 20, 16, 3, 1, 1, 1),
        (1, 50, 66, 18, 16, 3, 1, 1, 1),  // more than one part an image
        (3, 8, 9, 200, 150, 3, 1, 1, 1),  // threads go through the stages together
        (90, 7, 4, 190, 160, 3, 1, 1, 1), // the same, more than one group
    ]
    .map(shape)
    .to_vec()
}

fn close(what: &str, got: &[f32], want: &[f64]) {
    let most = want.iter().fold(0.0f64, |m, v| m.max(v.abs()));
    for (i, (g, w)) in got.iter().zip(want).enumerate() {
        // A sum of up to some thousand products in f32.
        assert!((f64::from(*g) - w).abs() <= 1e-6 + 1e-5 * most, "{what}[{i}]: {g} is not {w}");
    }
}

#[test]
fn convolution_and_its_gradients_agree_with_the_definition() {
    for s in shapes() {
        let [of_x, of_w, of_y] = s.lengths();
        let (x, w, dy) = (noise(of_x, 1), noise(of_w, 2), noise(of_y, 3));
        let [y, dx, dw] = reference::conv(&s, &x, &w, &dy);
        for isa in isa::available() {
            close(&format!("{isa:?} {s:?} y"), &forward(isa, &s, &x, &w), &y);
            close(&format!("{isa:?} {s:?} dx"), &backward_data(isa, &s, &w, &dy), &dx);
            close(&format!("{isa:?} {s:?} dw"), &backward_weight(isa, &s, x.as_slice().into(), &dy), &dw);
        }
    }
}

/// Root mean square of what differs, in shares of the same of what is wanted.
fn error(got: &[f32], want: &[f64]) -> f64 {
    let of = |v: f64| v * v;
    let apart: f64 = got.iter().zip(want).map(|(g, w)| of(f64::from(*g) - w)).sum();
    (apart / want.iter().map(|w| of(*w)).sum::<f64>()).sqrt()
}

#[test]
fn products_of_bf16_are_within_its_rounding() {
    for isa in isa::available_halves() {
        for s in shapes() {
            let [of_x, of_w, of_y] = s.lengths();
            let (x, w, dy) = (noise(of_x, 1), noise(of_w, 2), noise(of_y, 3));
            let [y, dx, dw] = reference::conv(&s, &x, &w, &dy);
            // A factor is rounded by at most 2^-9 of itself, and by a third to a half of that in the mean; Winograd's maps multiply the
            // errors of what they map.
            let winograd = s.kernel == 3 && s.stride == 1 && s.dilation == 1 && s.c_in.min(s.c_out) >= 16;
            let most = if winograd { 0.015 } else { 0.0035 };
            for (what, got, want) in [
                ("y", forward(isa, &s, &x, &w), y),
                ("dx", backward_data(isa, &s, &w, &dy), dx),
                ("dw", backward_weight(isa, &s, x.as_slice().into(), &dy), dw),
            ] {
                let error = error(&got, &want);
                assert!(error <= most, "{isa:?} {s:?} {what}: {error}");
            }
        }
    }
}

#[test]
fn a_pending_norm_is_the_norm_applied_before() {
    for s in shapes() {
        let [of_x, of_w, of_y] = s.lengths();
        let (x, w, dy) = (noise(of_x, 1), noise(of_w, 2), noise(of_y, 3));
        let (scale, shift) = (noise(s.c_in, 4), noise(s.c_in, 5));
        for isa in isa::available().into_iter().chain(isa::available_halves()) {
            for relu in [true, false] {
                let pending = Pending::new(&scale, &shift, relu);
                let lazy = Input { values: &x, pending: Some(&pending) };
                let done = norm::affine_act(isa, &x, &scale, &shift, None, relu);
                let y = forward_then(isa, &s, lazy, &w, |_, _| ()).0;
                assert_eq!(y, forward(isa, &s, &done, &w), "{isa:?} {s:?}");
                let dw = backward_weight(isa, &s, lazy, &dy);
                assert_eq!(dw, backward_weight(isa, &s, done.as_slice().into(), &dy), "{isa:?} {s:?}");
            }
        }
    }
}

#[test]
fn the_gradient_in_place_is_the_gradient() {
    let (m, c) = (700, 5);
    let (y, dout, gamma, beta) = (noise(m * c, 1), noise(m * c, 2), noise(c, 3), noise(c, 4));
    for isa in isa::available() {
        let (mean, var) = norm::moments(isa, &y, c);
        let norm = Norm::new(&gamma, &beta, &mean, &norm::inverse_deviation(&var, 1e-5));
        let totals = norm.totals(&[norm.sums(isa, &dout, &y, Gate::Relu, None)], m, |_| ());
        let mut g = dout.clone();
        norm.by_y_in_place(isa, &totals, &mut g, &y);
        assert_eq!(g, norm.by_y(isa, &totals, &dout, &y, Gate::Relu), "{isa:?}");
    }
}

#[test]
fn the_number_of_threads_changes_no_bit() {
    let all = |isa: &'static Isa, threads| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        pool.install(|| {
            let mut out = Vec::new();
            for s in shapes() {
                let [of_x, of_w, of_y] = s.lengths();
                let (x, w, dy) = (noise(of_x, 1), noise(of_w, 2), noise(of_y, 3));
                out.push(forward(isa, &s, &x, &w));
                out.push(backward_data(isa, &s, &w, &dy));
                out.push(backward_weight(isa, &s, x.as_slice().into(), &dy));
                let (mean, var) = norm::moments(isa, &dy, s.c_out);
                let inverse = norm::inverse_deviation(&var, 1e-5);
                let (gamma, beta) = (noise(s.c_out, 4), noise(s.c_out, 6));
                let used = Norm::new(&gamma, &beta, &mean, &inverse);
                let g = norm::backward(isa, &dy, Gate::AddRelu(&noise(of_y, 5)), &used, &dy, |_| ());
                out.extend([mean, var, g.dy, g.dgamma, g.dbeta]);
            }
            out
        })
    };
    let bits = |v: Vec<Vec<f32>>| v.into_iter().flatten().map(f32::to_bits).collect::<Vec<_>>();
    for isa in isa::available().into_iter().chain(isa::available_halves()) {
        assert_eq!(bits(all(isa, 1)), bits(all(isa, 3)), "{isa:?}");
    }
}

#[test]
fn norm_and_its_gradients_agree_with_the_definition() {
    for isa in isa::available() {
        for (m, c) in [(2, 3), (700, 5), (31, 17), (9000, 16), (40, 130)] {
            for (relu, with_skip) in [(false, false), (true, false), (true, true), (false, true)] {
                norm_agrees(isa, m, c, relu, with_skip);
            }
        }
    }
}

fn norm_agrees(isa: &Isa, m: usize, c: usize, relu: bool, with_skip: bool) {
    // Far from 0, as an unlucky channel is; but two rows, whose gradient cancels, must not lose digits too.
    let away = if m > 2 { 3.0 } else { 0.0 };
    let y: Vec<f32> = noise(m * c, 1).into_iter().map(|v| v + away).collect();
    let (skip, dout) = (noise(m * c, 2), noise(m * c, 3));
    let (gamma, beta) = (noise(c, 4), noise(c, 5));
    let (mean, var) = norm::moments(isa, &y, c);
    let inverse = norm::inverse_deviation(&var, 1e-5);
    let (scale, shift) = norm::scale_shift(&gamma, &beta, &mean, &inverse);
    let out = norm::affine_act(isa, &y, &scale, &shift, with_skip.then_some(&skip[..]), relu);
    let gate = match (relu, with_skip) {
        (false, false) => Gate::Open,
        (true, false) => Gate::Relu,
        (true, true) => Gate::AddRelu(&out),
        (false, true) => Gate::Add,
    };
    let used = Norm::new(&gamma, &beta, &mean, &inverse);
    let g = norm::backward(isa, &dout, gate, &used, &y, |_| ());
    assert_eq!(g.dskip.is_some(), with_skip);
    for k in 0..c {
        let at = |r: usize| r * c + k;
        let f = |v: &[f32], r: usize| f64::from(v[at(r)]);
        let mf = m as f64;
        let mu = (0..m).map(|r| f(&y, r)).sum::<f64>() / mf;
        let v = (0..m).map(|r| (f(&y, r) - mu).powi(2)).sum::<f64>() / mf;
        close("mean", &[mean[k]], &[mu]);
        close("variance", &[var[k]], &[v]);
        let inv = 1.0 / (v + 1e-5).sqrt();
        let hat = |r: usize| (f(&y, r) - mu) * inv;
        let pre = |r: usize| {
            let own = hat(r) * f64::from(gamma[k]) + f64::from(beta[k]);
            if with_skip { own + f(&skip, r) } else { own }
        };
        let pass = |r: usize| if relu && out[at(r)] <= 0.0 { 0.0 } else { f(&dout, r) };
        let want: Vec<[f64; 3]> = {
            let db: f64 = (0..m).map(pass).sum();
            let dg: f64 = (0..m).map(|r| pass(r) * hat(r)).sum();
            // Against what they sum, not against a sum that happens to cancel.
            let size: f64 = (0..m).map(|r| pass(r).abs() * (1.0 + hat(r).abs())).sum();
            close("dbeta, dgamma", &[g.dbeta[k], g.dgamma[k], size as f32], &[db, dg, size]);
            let dy = |r: usize| f64::from(gamma[k]) * inv * (pass(r) - db / mf - hat(r) * dg / mf);
            (0..m).map(|r| [if relu { pre(r).max(0.0) } else { pre(r) }, dy(r), pass(r)]).collect()
        };
        let column = |v: &[f32]| (0..m).map(|r| v[at(r)]).collect::<Vec<_>>();
        let of = |i: usize| want.iter().map(|w| w[i]).collect::<Vec<_>>();
        close("out", &column(&out), &of(0));
        close("dy", &column(&g.dy), &of(1));
        if let Some(dskip) = &g.dskip {
            close("dskip", &column(dskip), &of(2));
        }
    }
}

#[test]
fn pooling_and_its_gradients_agree_with_the_definition() {
    for (n, h, w, c, kernel, stride, padding) in [
        (1, 1, 1, 1, 3, 2, 1),
        (2, 5, 8, 3, 3, 2, 1),
        (3, 8, 7, 17, 3, 2, 1),
        (2, 9, 9, 64, 3, 2, 1),
        (1, 6, 5, 5, 2, 2, 0),
        (1, 7, 7, 9, 3, 1, 2),
    ] {
        let s = Windows { n, h, w, c, kernel, stride, padding };
        // Few different values, so that many are equally large, as behind a ReLU.
        let x: Vec<f32> = noise(n * h * w * c, 1).iter().map(|v| (4.0 * v).round().max(0.0)).collect();
        let dout = noise(n * s.h_out() * s.w_out() * c, 2);
        let [out, dx] = reference::max_pool(&s, &x, &dout);
        for isa in isa::available() {
            let got = pool::max(isa, &s, &x);
            close(&format!("{isa:?} {s:?} out"), &got, &out);
            close(&format!("{isa:?} {s:?} dx"), &pool::max_backward(isa, &s, &x, &got, &dout), &dx);
        }
        let mean = pool::mean(&x, n, c);
        for (i, m) in mean.iter().enumerate() {
            let of = x[i / c * h * w * c..].iter().skip(i % c).step_by(c).take(h * w);
            let want = of.map(|v| f64::from(*v)).sum::<f64>() / (h * w) as f64;
            assert!((f64::from(*m) - want).abs() < 1e-6);
        }
        let back = pool::mean_backward(&mean, h * w, c);
        assert!((0..back.len()).all(|i| back[i] == mean[i / (h * w * c) * c + i % c] / (h * w) as f32));
    }
}
