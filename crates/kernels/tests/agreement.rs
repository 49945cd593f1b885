//! Fast = plain, over awkward shapes; and 1 thread = 3 threads, bit for bit.

use byol_kernels::{
    conv::{Shape, backward_data, backward_weight, forward},
    norm, reference,
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
    let shape =
        |(n, h, w, c_in, c_out, kernel, stride, padding)| Shape { n, h, w, c_in, c_out, kernel, stride, padding };
    [
        (1, 1, 1, 3, 5, 1, 1, 0),
        (1, 1, 1, 3, 5, 3, 1, 1),
        (1, 1, 1, 3, 4, 7, 2, 3),
        (2, 5, 7, 3, 17, 3, 1, 1),
        (3, 9, 8, 17, 5, 3, 2, 1),
        (2, 6, 11, 16, 32, 1, 2, 0),
        (5, 4, 4, 16, 8, 1, 1, 0),
        (2, 33, 29, 3, 6, 7, 2, 3),
        (9, 4, 4, 33, 7, 3, 1, 1),
        (1, 40, 200, 40, 3, 3, 1, 1), // more than one tile an image
        (70, 2, 2, 5, 6, 3, 1, 1),    // more than one group
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
        close(&format!("{s:?} y"), &forward(&s, &x, &w), &y);
        close(&format!("{s:?} dx"), &backward_data(&s, &w, &dy), &dx);
        close(&format!("{s:?} dw"), &backward_weight(&s, &x, &dy), &dw);
    }
}

#[test]
fn the_number_of_threads_changes_no_bit() {
    let all = |threads| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        pool.install(|| {
            let mut out = Vec::new();
            for s in shapes() {
                let [of_x, of_w, of_y] = s.lengths();
                let (x, w, dy) = (noise(of_x, 1), noise(of_w, 2), noise(of_y, 3));
                out.extend([forward(&s, &x, &w), backward_data(&s, &w, &dy), backward_weight(&s, &x, &dy)]);
                let (mean, var) = norm::moments(&dy, s.c_out);
                let inverse = norm::inverse_deviation(&var, 1e-5);
                let gamma = noise(s.c_out, 4);
                let g = norm::backward(&dy, &noise(of_y, 5), &dy, &gamma, &mean, &inverse, true);
                out.extend([mean, var, g.dy, g.dgamma, g.dbeta]);
            }
            out
        })
    };
    let bits = |v: Vec<Vec<f32>>| v.into_iter().flatten().map(f32::to_bits).collect::<Vec<_>>();
    assert_eq!(bits(all(1)), bits(all(3)));
}

#[test]
fn norm_and_its_gradients_agree_with_the_definition() {
    for (m, c) in [(2, 3), (700, 5), (31, 17)] {
        for (relu, with_skip) in [(false, false), (true, false), (true, true)] {
            let (y, skip, dout) = (noise(m * c, 1), noise(m * c, 2), noise(m * c, 3));
            let (gamma, beta) = (noise(c, 4), noise(c, 5));
            let (mean, var) = norm::moments(&y, c);
            let inverse = norm::inverse_deviation(&var, 1e-5);
            let (scale, shift) = norm::scale_shift(&gamma, &beta, &mean, &inverse);
            let out = norm::affine_act(&y, &scale, &shift, with_skip.then_some(&skip[..]), relu);
            let g = norm::backward(&dout, &out, &y, &gamma, &mean, &inverse, relu);
            for k in 0..c {
                let at = |r: usize| r * c + k;
                let f = |v: &[f32], r: usize| f64::from(v[at(r)]);
                let mf = m as f64;
                let mu = (0..m).map(|r| f(&y, r)).sum::<f64>() / mf;
                let v = (0..m).map(|r| (f(&y, r) - mu).powi(2)).sum::<f64>() / mf;
                let inv = 1.0 / (v + 1e-5).sqrt();
                let hat = |r: usize| (f(&y, r) - mu) * inv;
                let pre = |r: usize| {
                    let own = hat(r) * f64::from(gamma[k]) + f64::from(beta[k]);
                    if with_skip { own + f(&skip, r) } else { own }
                };
                let pass = |r: usize| if relu && out[at(r)] <= 0.0 { 0.0 } else { f(&dout, r) };
                let db: f64 = (0..m).map(pass).sum();
                let dg: f64 = (0..m).map(|r| pass(r) * hat(r)).sum();
                close("dbeta", &[g.dbeta[k]], &[db]);
                close("dgamma", &[g.dgamma[k]], &[dg]);
                for r in 0..m {
                    close("out", &[out[at(r)]], &[if relu { pre(r).max(0.0) } else { pre(r) }]);
                    let dy = f64::from(gamma[k]) * inv * (pass(r) - db / mf - hat(r) * dg / mf);
                    close("dy", &[g.dy[at(r)]], &[dy]);
                    close("dskip", &[g.dskip[at(r)]], &[pass(r)]);
                }
            }
        }
    }
}
