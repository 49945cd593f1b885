//! Kernels agree with the reference implementations for awkward shapes on every instruction set,
//! and 1 thread and 3 threads give the same bits.

use std::io::{self, Write};

use byol_kernels::{
    Bf16,
    conv::{
        AddMap, Input, NoEpilogue, Shape, ShiftAct, SumNormGrads, TakeMoments, backward_data, backward_data_fused,
        backward_weight, forward, forward_fused,
    },
    isa::{self, Isa},
    norm::{self, DeferredNorm, NormBackward, ReluMask},
    pool::{self, PoolShape},
    reference,
    storage::{Storage, Values},
};

/// Pseudo-random values in [−0.5, 0.5).
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
        (3, 8, 8, 64, 96, 1, 1, 0, 1),     // whole tiles of a matrix unit
        (2, 5, 5, 256, 256, 1, 1, 0, 1),   // its blocks summed in their place
        (9, 12, 12, 256, 256, 1, 1, 0, 1), // the same, in more than one group
        (2, 32, 32, 3, 96, 16, 16, 0, 1),  // windows side by side
        (1, 4, 4, 16, 16, 1, 1, 1, 1),     // a padding beyond the kernel
        (2, 5, 6, 17, 20, 3, 1, 3, 1),     // the same
        (2, 33, 29, 3, 6, 7, 2, 3, 1),
        (9, 4, 4, 33, 7, 3, 1, 1, 1),
        (1, 9, 11, 6, 19, 3, 1, 2, 2),
        (2, 11, 8, 5, 33, 3, 2, 2, 2),
        (1, 13, 12, 4, 3, 3, 3, 0, 1),
        (1, 10, 9, 2, 3, 2, 3, 0, 1),      // input pixels that no window covers
        (1, 40, 200, 40, 3, 3, 1, 1, 1),   // more than one task per image
        (1, 60, 90, 32, 5, 3, 2, 1, 1),    // the same with a stride
        (70, 2, 2, 5, 6, 3, 1, 1, 1),      // more than one task
        (3, 5, 4, 130, 72, 3, 1, 1, 1),    // weights that all threads sum into
        (40, 14, 15, 150, 70, 3, 2, 1, 1), // the same, in more than one group
        (2, 9, 8, 16, 16, 3, 1, 1, 1),     // Winograd: from here on
        (3, 5, 4, 17, 35, 3, 1, 1, 1),
        (1, 3, 7, 40, 16, 3, 1, 0, 1),
        (2, 6, 5, 16, 21, 3, 1, 2, 1),
        (150, 4, 4, 20, 16, 3, 1, 1, 1),
        (1, 50, 66, 18, 16, 3, 1, 1, 1),  // more than one band per image
        (3, 8, 9, 200, 150, 3, 1, 1, 1),  // cooperative threads
        (90, 7, 4, 190, 160, 3, 1, 1, 1), // the same, in more than one group
    ]
    .map(shape)
    .to_vec()
}

/// The definition of a matrix unit takes seconds for the largest shapes.
fn is_slow(isa: &Isa, s: &Shape) -> bool {
    isa.name == "portable with tiles" && s.multiply_adds() > 50_000_000
}

fn assert_close(what: &str, actual: &[f32], expected: &[f64]) {
    let max = expected.iter().fold(0.0f64, |m, v| m.max(v.abs()));
    for (i, (a, e)) in actual.iter().zip(expected).enumerate() {
        // The error of sums of up to some thousand products in f32.
        assert!((f64::from(*a) - e).abs() <= 1e-6 + 1e-5 * max, "{what}[{i}] is {a}, expected {e}");
    }
}

#[test]
fn convolution_and_gradients_match_the_reference() {
    for s in shapes() {
        let [x_len, w_len, y_len] = s.lengths();
        let (x, w, dy) = (noise(x_len, 1), noise(w_len, 2), noise(y_len, 3));
        let [y, dx, dw] = reference::conv(&s, &x, &w, &dy);
        for isa in isa::available() {
            assert_close(&format!("{isa:?} {s:?} y"), &forward(isa, &s, &x, &w), &y);
            assert_close(&format!("{isa:?} {s:?} dx"), &backward_data(isa, &s, &w, &dy), &dx);
            assert_close(
                &format!("{isa:?} {s:?} dw"),
                &backward_weight(isa, &s, x.as_slice().into(), Values::F32(&dy)),
                &dw,
            );
        }
    }
}

/// Root mean square of the error, relative to that of the expected values.
fn relative_error(actual: &[f32], expected: &[f64]) -> f64 {
    let squared_error: f64 = actual.iter().zip(expected).map(|(a, e)| (f64::from(*a) - e).powi(2)).sum();
    (squared_error / expected.iter().map(|e| e * e).sum::<f64>()).sqrt()
}

#[test]
fn bf16_convolution_is_within_rounding_error() {
    for isa in isa::available_bf16() {
        for s in shapes().into_iter().filter(|s| !is_slow(isa, s)) {
            let [x_len, w_len, y_len] = s.lengths();
            let (x, w, dy) = (noise(x_len, 1), noise(w_len, 2), noise(y_len, 3));
            let [y, dx, dw] = reference::conv(&s, &x, &w, &dy);
            // An operand is rounded by at most 2^-9 of its value, and by a third to a half of that
            // on average. Winograd's transforms amplify the error.
            let tiles = isa.name.contains("AMX") || isa.name.contains("tiles");
            let winograd = !tiles && s.kernel == 3 && s.stride == 1 && s.dilation == 1 && s.c_in.min(s.c_out) >= 16;
            let bound = if winograd { 0.015 } else { 0.0035 };
            for (what, actual, expected) in [
                ("y", forward(isa, &s, &x, &w), y),
                ("dx", backward_data(isa, &s, &w, &dy), dx),
                ("dw", backward_weight(isa, &s, x.as_slice().into(), Values::F32(&dy)), dw),
            ] {
                let error = relative_error(&actual, &expected);
                assert!(error <= bound, "{isa:?} {s:?} {what}: {error}");
            }
        }
    }
}

#[test]
fn matrix_unit_agrees_with_its_definition() {
    let all = isa::available_bf16();
    let find = |name: &str| all.iter().copied().find(|isa| isa.name.ends_with(name));
    let definition = find("with tiles").expect("the definition runs on every processor");
    let Some(unit) = find("with AMX") else {
        // Past the capture of the test harness.
        let skipped = writeln!(io::stderr(), "SKIPPED: matrix_unit_agrees_with_its_definition (no AMX)");
        return skipped.expect("standard error is open");
    };
    for s in shapes().into_iter().filter(|s| !is_slow(definition, s)) {
        let [x_len, w_len, y_len] = s.lengths();
        let (x, w, dy) = (noise(x_len, 1), noise(w_len, 2), noise(y_len, 3));
        let results = |isa: &Isa| {
            let dw = backward_weight(isa, &s, x.as_slice().into(), Values::F32(&dy));
            [forward(isa, &s, &x, &w), backward_data(isa, &s, &w, &dy), dw]
        };
        for (what, (actual, expected)) in ["y", "dx", "dw"].iter().zip(results(unit).iter().zip(&results(definition))) {
            // The operands are the same; only the order of sums differs.
            assert_close(&format!("{s:?} {what}"), actual, &expected.iter().map(|v| f64::from(*v)).collect::<Vec<_>>());
        }
    }
}

#[test]
fn deferred_norm_equals_norm_applied_before() {
    for s in shapes() {
        let [x_len, w_len, y_len] = s.lengths();
        let (x, w, dy) = (noise(x_len, 1), noise(w_len, 2), noise(y_len, 3));
        let (scale, shift) = (noise(s.c_in, 4), noise(s.c_in, 5));
        for isa in isa::available().into_iter().chain(isa::available_bf16()).filter(|isa| !is_slow(isa, &s)) {
            for relu in [true, false] {
                let norm = DeferredNorm::new(&scale, &shift, relu);
                let deferred = Input { values: Values::F32(&x), norm: Some(&norm) };
                let applied = norm::affine_act(isa, &x[..], &scale, &shift, None, relu);
                let y = forward_fused::<f32, _>(isa, &s, deferred, &w, &NoEpilogue).0;
                assert_eq!(y, forward(isa, &s, &applied, &w), "{isa:?} {s:?}");
                let dw = backward_weight(isa, &s, deferred, Values::F32(&dy));
                assert_eq!(dw, backward_weight(isa, &s, applied.as_slice().into(), Values::F32(&dy)), "{isa:?} {s:?}");
            }
        }
    }
}

/// Rounds to bf16, with the values as f32.
fn rounded(isa: &Isa, values: &[f32]) -> (Vec<Bf16>, Vec<f32>) {
    let rounded = Bf16::from_f32(isa, values.to_vec());
    let wide = Bf16::load(isa, &rounded, &mut Vec::new()).to_vec();
    (rounded, wide)
}

#[test]
fn maps_stored_as_bf16_have_the_same_results_rounded() {
    for s in shapes() {
        let [x_len, w_len, y_len] = s.lengths();
        let (x, w, dy) = (noise(x_len, 1), noise(w_len, 2), noise(y_len, 3));
        let (scale, shift) = (noise(s.c_in, 4), noise(s.c_in, 5));
        let norm = DeferredNorm::new(&scale, &shift, true);
        for isa in isa::available().into_iter().chain(isa::available_bf16()).filter(|isa| !is_slow(isa, &s)) {
            let ((x, x_wide), (dy, dy_wide)) = (rounded(isa, &x), rounded(isa, &dy));
            let (x_f32, dy_f32) = (Values::F32(&x_wide), Values::F32(&dy_wide));
            for norm in [None, Some(&norm)] {
                let [stored, wide] = [Values::Bf16(&x), x_f32].map(|values| Input { values, norm });
                let (y, _) = forward_fused::<Bf16, _>(isa, &s, stored, &w, &NoEpilogue);
                let (expected, _) = forward_fused::<f32, _>(isa, &s, wide, &w, &NoEpilogue);
                assert_eq!(y, Bf16::from_f32(isa, expected), "{isa:?} {s:?} y");
                let dw = backward_weight(isa, &s, stored, Values::Bf16(&dy));
                assert_eq!(dw, backward_weight(isa, &s, wide, dy_f32), "{isa:?} {s:?} dw");
            }
            let dx = backward_data_fused::<Bf16, _>(isa, &s, &w, Values::Bf16(&dy), &NoEpilogue).0;
            let expected = backward_data_fused::<f32, _>(isa, &s, &w, dy_f32, &NoEpilogue).0;
            assert_eq!(dx, Bf16::from_f32(isa, expected), "{isa:?} {s:?} dx");
        }
    }
}

/// Checks that epilogues compute what separate passes over the result do, with maps stored as `T`.
fn check_epilogues<T: Storage + PartialEq + std::fmt::Debug>(isa: &Isa, s: &Shape) {
    let [x_len, w_len, y_len] = s.lengths();
    let (x, w, dy) = (noise(x_len, 1), noise(w_len, 2), noise(y_len, 3));
    let (x_stored, dy_stored) = (T::from_f32(isa, x.clone()), T::from_f32(isa, dy));
    let (x, dy) = (Input::from(&x_stored[..]), T::values(&dy_stored));
    let wide = |map: &[T]| T::load(isa, map, &mut Vec::new()).to_vec();
    let as_f64 = |values: &[f32]| values.iter().map(|v| f64::from(*v)).collect::<Vec<_>>();
    let y = forward_fused::<f32, _>(isa, s, x, &w, &NoEpilogue).0;
    let rounded_y = T::from_f32(isa, y.clone());

    let (moments_y, parts) = forward_fused::<T, _>(isa, s, x, &w, &TakeMoments { c: s.c_out });
    assert_eq!(moments_y, rounded_y, "{isa:?} {s:?} moments");
    let (mean, variance) = norm::Moments::merge(&parts, s.c_out).mean_variance();
    let expected = norm::moments(isa, &y, s.c_out);
    assert_close(&format!("{isa:?} {s:?} mean"), &mean, &as_f64(&expected.0));
    assert_close(&format!("{isa:?} {s:?} variance"), &variance, &as_f64(&expected.1));

    let (shift, skip) = (noise(s.c_out, 4), T::from_f32(isa, noise(y_len, 5)));
    for (skip, relu) in [(None, true), (Some(&skip[..]), true), (Some(&skip[..]), false)] {
        let actual = forward_fused::<T, _>(isa, s, x, &w, &ShiftAct { shift: &shift, skip, relu }).0;
        let mut expected = y.clone();
        norm::shift_act(isa, &mut expected, &shift, skip.map(wide).as_deref(), relu);
        assert_eq!(actual, T::from_f32(isa, expected), "{isa:?} {s:?} shift");
    }

    let dx = backward_data_fused::<f32, _>(isa, s, &w, dy, &NoEpilogue).0;
    let sum = backward_data_fused::<T, _>(isa, s, &w, dy, &AddMap(&x_stored)).0;
    let expected: Vec<f32> = dx.iter().zip(wide(&x_stored)).map(|(d, x)| d + x).collect();
    assert_eq!(sum, T::from_f32(isa, expected), "{isa:?} {s:?} sum");

    let vectors = [4, 5, 6, 7].map(|seed| noise(s.c_in, seed));
    let norm = NormBackward::new(&vectors[0], &vectors[1], &vectors[2], &vectors[3]);
    let (g, parts) = backward_data_fused::<T, _>(isa, s, &w, dy, &SumNormGrads { norm: &norm, y: &x_stored });
    assert_eq!(g, T::from_f32(isa, dx.clone()), "{isa:?} {s:?} gradient of a norm");
    let pixels = x_len / s.c_in;
    let totals = norm.grad_totals(&parts, pixels, |_| ());
    let whole = norm.grad_sums(isa, &dx, &wide(&x_stored), ReluMask::FromNorm, None);
    let expected = norm.grad_totals(&[whole], pixels, |_| ());
    assert_close(&format!("{isa:?} {s:?} gamma"), &totals.dgamma, &as_f64(&expected.dgamma));
    assert_close(&format!("{isa:?} {s:?} beta"), &totals.dbeta, &as_f64(&expected.dbeta));
}

#[test]
fn epilogues_equal_separate_passes() {
    for s in shapes() {
        for isa in isa::available().into_iter().chain(isa::available_bf16()).filter(|isa| !is_slow(isa, &s)) {
            check_epilogues::<f32>(isa, &s);
            check_epilogues::<Bf16>(isa, &s);
        }
    }
}

#[test]
fn norms_and_pools_of_bf16_maps_have_the_same_results_rounded() {
    let (m, c) = (9000, 17);
    let (scale, shift, mean, inverse_std) = (noise(c, 1), noise(c, 2), noise(c, 3), vec![2.0; c]);
    let (y, skip, dout) = (noise(m * c, 4), noise(m * c, 5), noise(m * c, 6));
    for isa in isa::available() {
        let ((y, y_wide), (skip, skip_wide), (dout, dout_wide)) =
            (rounded(isa, &y), rounded(isa, &skip), rounded(isa, &dout));
        let out = norm::affine_act(isa, &y[..], &scale, &shift, Some(&skip[..]), true);
        let expected = norm::affine_act(isa, &y_wide[..], &scale, &shift, Some(&skip_wide[..]), true);
        assert_eq!(out, Bf16::from_f32(isa, expected), "{isa:?}");
        let (out, out_wide) = (&out, rounded(isa, Bf16::load(isa, &out, &mut Vec::new())).1);
        let backward = NormBackward::new(&scale, &shift, &mean, &inverse_std);
        for (mask, wide_mask) in [
            (ReluMask::FromNorm, ReluMask::FromNorm),
            (ReluMask::FromOutput(&out[..]), ReluMask::FromOutput(&out_wide[..])),
        ] {
            let g = norm::backward(isa, &dout[..], mask, &backward, &y[..], |_| ());
            let expected = norm::backward(isa, &dout_wide[..], wide_mask, &backward, &y_wide[..], |_| ());
            assert_eq!(g.dy, Bf16::from_f32(isa, expected.dy), "{isa:?}");
            assert_eq!(g.dskip, expected.dskip.map(|dskip| Bf16::from_f32(isa, dskip)), "{isa:?}");
            assert_eq!((g.dgamma, g.dbeta), (expected.dgamma, expected.dbeta), "{isa:?}");
        }
        let s = PoolShape { n: 3, h: 20, w: 150, c, kernel: 3, stride: 2, padding: 1 };
        let (pooled, pooled_wide) = (pool::max(isa, &s, &y[..]), pool::max(isa, &s, &y_wide[..]));
        assert_eq!(pooled, Bf16::from_f32(isa, pooled_wide.clone()), "{isa:?}");
        let dpooled = &dout[..pooled.len()];
        let dx = pool::max_backward(isa, &s, &y[..], &pooled[..], dpooled);
        let expected = pool::max_backward(isa, &s, &y_wide[..], &pooled_wide[..], &dout_wide[..pooled.len()]);
        assert_eq!(dx, Bf16::from_f32(isa, expected), "{isa:?}");
        assert_eq!(pool::mean(isa, &y[..], 3, c), pool::mean(isa, &y_wide[..], 3, c), "{isa:?}");
        let dmean = pool::mean_backward::<Bf16>(isa, &dout_wide[..3 * c], 35, c);
        let expected = pool::mean_backward::<f32>(isa, &dout_wide[..3 * c], 35, c);
        assert_eq!(dmean, Bf16::from_f32(isa, expected), "{isa:?}");
    }
}

#[test]
fn in_place_input_gradient_is_identical() {
    let (m, c) = (700, 5);
    let (y, dout, gamma, beta) = (noise(m * c, 1), noise(m * c, 2), noise(c, 3), noise(c, 4));
    for isa in isa::available() {
        let (mean, var) = norm::moments(isa, &y, c);
        let norm = NormBackward::new(&gamma, &beta, &mean, &norm::inverse_std(&var, 1e-5));
        let totals = norm.grad_totals(&[norm.grad_sums(isa, &dout[..], &y[..], ReluMask::FromNorm, None)], m, |_| ());
        let mut grad = dout.clone();
        norm.input_grad_in_place(isa, &totals, &mut grad, &y);
        assert_eq!(grad, norm.input_grad(isa, &totals, &dout, &y[..], ReluMask::FromNorm), "{isa:?}");
    }
}

#[test]
fn results_are_bit_identical_for_any_thread_count() {
    let results = |isa: &'static Isa, threads| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        pool.install(|| {
            let mut out = Vec::new();
            for s in shapes().into_iter().filter(|s| !is_slow(isa, s)) {
                let [x_len, w_len, y_len] = s.lengths();
                let (x, w, dy) = (noise(x_len, 1), noise(w_len, 2), noise(y_len, 3));
                out.push(forward(isa, &s, &x, &w));
                out.push(backward_data(isa, &s, &w, &dy));
                out.push(backward_weight(isa, &s, x.as_slice().into(), Values::F32(&dy)));
                let (mean, var) = norm::moments(isa, &dy, s.c_out);
                let inverse_std = norm::inverse_std(&var, 1e-5);
                let (gamma, beta) = (noise(s.c_out, 4), noise(s.c_out, 6));
                let norm = NormBackward::new(&gamma, &beta, &mean, &inverse_std);
                let g = norm::backward(isa, &dy, ReluMask::FromOutput(&noise(y_len, 5)), &norm, &dy[..], |_| ());
                out.extend([mean, var, g.dy, g.dgamma, g.dbeta]);
            }
            out
        })
    };
    let bits = |v: Vec<Vec<f32>>| v.into_iter().flatten().map(f32::to_bits).collect::<Vec<_>>();
    for isa in isa::available().into_iter().chain(isa::available_bf16()) {
        assert_eq!(bits(results(isa, 1)), bits(results(isa, 3)), "{isa:?}");
    }
}

#[test]
fn norm_and_gradients_match_the_reference() {
    for isa in isa::available() {
        for (m, c) in [(2, 3), (700, 5), (31, 17), (9000, 16), (40, 130)] {
            for (relu, with_skip) in [(false, false), (true, false), (true, true), (false, true)] {
                check_norm(isa, m, c, relu, with_skip);
            }
        }
    }
}

fn check_norm(isa: &Isa, m: usize, c: usize, relu: bool, with_skip: bool) {
    // A mean far from 0, the hard case for the variance; except with two pixels, whose gradient
    // cancels and would lose further digits.
    let mean = if m > 2 { 3.0 } else { 0.0 };
    let y: Vec<f32> = noise(m * c, 1).into_iter().map(|v| v + mean).collect();
    let (skip, dout) = (noise(m * c, 2), noise(m * c, 3));
    let (gamma, beta) = (noise(c, 4), noise(c, 5));
    let (mean, var) = norm::moments(isa, &y, c);
    let inverse_std = norm::inverse_std(&var, 1e-5);
    let (scale, shift) = norm::scale_shift(&gamma, &beta, &mean, &inverse_std);
    let out = norm::affine_act(isa, &y[..], &scale, &shift, with_skip.then_some(&skip[..]), relu);
    let mask = match (relu, with_skip) {
        (false, false) => ReluMask::None,
        (true, false) => ReluMask::FromNorm,
        (true, true) => ReluMask::FromOutput(&out),
        (false, true) => ReluMask::NoneWithSkip,
    };
    let norm = NormBackward::new(&gamma, &beta, &mean, &inverse_std);
    let g = norm::backward(isa, &dout, mask, &norm, &y[..], |_| ());
    assert_eq!(g.dskip.is_some(), with_skip);
    for k in 0..c {
        let index = |r: usize| r * c + k;
        let value = |v: &[f32], r: usize| f64::from(v[index(r)]);
        let n = m as f64;
        let mu = (0..m).map(|r| value(&y, r)).sum::<f64>() / n;
        let v = (0..m).map(|r| (value(&y, r) - mu).powi(2)).sum::<f64>() / n;
        assert_close("mean", &[mean[k]], &[mu]);
        assert_close("variance", &[var[k]], &[v]);
        let inverse = 1.0 / (v + 1e-5).sqrt();
        let hat = |r: usize| (value(&y, r) - mu) * inverse;
        let before_relu = |r: usize| {
            let normalized = hat(r) * f64::from(gamma[k]) + f64::from(beta[k]);
            if with_skip { normalized + value(&skip, r) } else { normalized }
        };
        let masked = |r: usize| if relu && out[index(r)] <= 0.0 { 0.0 } else { value(&dout, r) };
        let expected: Vec<[f64; 3]> = {
            let db: f64 = (0..m).map(masked).sum();
            let dg: f64 = (0..m).map(|r| masked(r) * hat(r)).sum();
            // The tolerance is relative to the summands' magnitude, not to a sum that may cancel.
            let size: f64 = (0..m).map(|r| masked(r).abs() * (1.0 + hat(r).abs())).sum();
            assert_close("dbeta, dgamma", &[g.dbeta[k], g.dgamma[k], size as f32], &[db, dg, size]);
            let dy = |r: usize| f64::from(gamma[k]) * inverse * (masked(r) - db / n - hat(r) * dg / n);
            let out = |r: usize| if relu { before_relu(r).max(0.0) } else { before_relu(r) };
            (0..m).map(|r| [out(r), dy(r), masked(r)]).collect()
        };
        let channel = |v: &[f32]| (0..m).map(|r| v[index(r)]).collect::<Vec<_>>();
        let expected = |i: usize| expected.iter().map(|e| e[i]).collect::<Vec<_>>();
        assert_close("out", &channel(&out), &expected(0));
        assert_close("dy", &channel(&g.dy), &expected(1));
        if let Some(dskip) = &g.dskip {
            assert_close("dskip", &channel(dskip), &expected(2));
        }
    }
}

#[test]
fn pooling_and_gradients_match_the_reference() {
    for (n, h, w, c, kernel, stride, padding) in [
        (1, 1, 1, 1, 3, 2, 1),
        (2, 5, 8, 3, 3, 2, 1),
        (3, 8, 7, 17, 3, 2, 1),
        (2, 9, 9, 64, 3, 2, 1),
        (1, 6, 5, 5, 2, 2, 0),
        (1, 7, 7, 9, 3, 1, 2),
    ] {
        let s = PoolShape { n, h, w, c, kernel, stride, padding };
        // Few distinct values, so that there are many ties, as after a ReLU.
        let x: Vec<f32> = noise(n * h * w * c, 1).iter().map(|v| (4.0 * v).round().max(0.0)).collect();
        let dout = noise(n * s.h_out() * s.w_out() * c, 2);
        let [out, dx] = reference::max_pool(&s, &x, &dout);
        for isa in isa::available() {
            let actual = pool::max(isa, &s, &x[..]);
            assert_close(&format!("{isa:?} {s:?} out"), &actual, &out);
            assert_close(&format!("{isa:?} {s:?} dx"), &pool::max_backward(isa, &s, &x[..], &actual[..], &dout), &dx);
        }
        let mean = pool::mean(isa::available()[0], &x[..], n, c);
        for (i, m) in mean.iter().enumerate() {
            let channel = x[i / c * h * w * c..].iter().skip(i % c).step_by(c).take(h * w);
            let expected = channel.map(|v| f64::from(*v)).sum::<f64>() / (h * w) as f64;
            assert!((f64::from(*m) - expected).abs() < 1e-6);
        }
        let dx = pool::mean_backward::<f32>(isa::available()[0], &mean, h * w, c);
        assert!((0..dx.len()).all(|i| dx[i] == mean[i / (h * w * c) * c + i % c] / (h * w) as f32));
    }
}
