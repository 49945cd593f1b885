//! Figures of merit against the oracle's, within its tolerances.

mod common;

use byol::eval::{
    Features, knn, logistic,
    metrics::{self, Confusion, Depth},
    spectrum, sphere,
};
use common::{Case, case, cases, close};

fn features(case: &Case, key: &str) -> Features {
    let shape = case.shape(key);
    let dim = shape[shape.len() - 1];
    Features { n: shape.iter().product::<usize>() / dim, dim, values: case.f32(key) }
}

fn flags(case: &Case, key: &str) -> Vec<bool> {
    case.u8(key).iter().map(|v| *v != 0).collect()
}

#[test]
fn nearest_neighbours() {
    for case in cases("knn_") {
        let classes = case.number("classes") as usize;
        let (bank, queries) = (features(&case, "train"), features(&case, "test"));
        let (of_bank, of_queries) = (case.usize("train_labels"), case.usize("test_labels"));
        let k = case.number("k") as usize;
        // Beside another k: one search serves both.
        let ks = [1, k];
        let got = knn::classify_each(&bank, &of_bank, &queries, &of_queries, classes, &ks, case.number("temperature"));
        assert_eq!(got[1].predicted, case.usize("prediction"), "{}", case.name);
        case.check("accuracy", &[got[1].accuracy]);
        for (row, (g, w)) in got[1].votes.chunks(classes).zip(case.f64("votes").chunks(classes)).enumerate() {
            close(&format!("{} row {row}", case.name), g, w, case.rtol, case.atol);
        }
    }
}

#[test]
fn logistic_regression() {
    for case in cases("logreg_") {
        let classes = case.number("classes") as usize;
        let x = features(&case, "x");
        let fitted = logistic::fit(&x, &case.usize("y"), classes, case.number("l2"));
        close(&case.name, &[fitted.objective], case.f64("objective"), 1e-8, 0.0);
        // The oracle's weights are [D, K].
        let by_feature: Vec<f64> = (0..x.dim)
            .flat_map(|d| (0..classes).map(move |k| (d, k)))
            .map(|(d, k)| fitted.classifier.w[k * x.dim + d])
            .collect();
        case.check("weight", &by_feature);
        case.check("bias", &fitted.classifier.b);
        let mut probabilities = fitted.classifier.scores(&features(&case, "x_test"));
        for row in probabilities.chunks_exact_mut(classes) {
            let most = row.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            row.iter_mut().for_each(|z| *z = (*z - most).exp());
            let sum: f64 = row.iter().sum();
            row.iter_mut().for_each(|z| *z /= sum);
        }
        case.check("probabilities", &probabilities);
    }
}

#[test]
fn accuracies() {
    let of_classes = case("mean_per_class");
    let (predicted, labels) = (of_classes.usize("prediction"), of_classes.usize("label"));
    of_classes.check(
        "mean_per_class",
        &[metrics::mean_per_class(&predicted, &labels, of_classes.number("classes") as usize)],
    );
    of_classes.check("overall", &[metrics::accuracy(&predicted, &labels)]);
    let top = case("topk");
    let (scores, labels, classes) = (top.f64("logits"), top.usize("labels"), top.shape("logits")[1]);
    for k in [1, 5] {
        let hits = metrics::in_top(scores, &labels, classes, k);
        let rate = hits.iter().filter(|h| **h).count() as f64 / hits.len() as f64;
        top.check(&format!("top{k}"), &[rate]);
    }
    top.check("top1", &[metrics::accuracy(&metrics::winners(scores, classes), &labels)]);
}

#[test]
fn average_precision() {
    let case = case("voc_map");
    let classes = case.shape("score")[1];
    let (positive, ignore) = (flags(&case, "positive"), flags(&case, "ignore"));
    let of = |class: usize, keep: &dyn Fn(usize) -> bool| {
        let at: Vec<usize> = (0..positive.len()).filter(|i| i % classes == class && keep(*i)).collect();
        let scores: Vec<f64> = at.iter().map(|i| case.f64("score")[*i]).collect();
        let positive: Vec<bool> = at.iter().map(|i| positive[*i]).collect();
        metrics::average_precision_11(&scores, &positive).expect("every class has a positive")
    };
    let all: Vec<f64> = (0..classes).map(|c| of(c, &|_| true)).collect();
    case.check("ap11", &all);
    case.check("map11", &[metrics::mean(all.into_iter())]);
    let kept: Vec<f64> = (0..classes).map(|c| of(c, &|i| !ignore[i])).collect();
    case.check("ap11_ignore", &kept);
    case.check("map11_ignore", &[metrics::mean(kept.into_iter())]);
    assert_eq!(metrics::average_precision_11(&[0.5, 0.2], &[false, false]), None);
}

#[test]
fn dense_predictions() {
    let seg = case("miou");
    let mut confusion = Confusion::new(seg.number("classes") as usize);
    // Image by image, as an evaluation counts.
    let pixels = seg.shape("label")[1..].iter().product();
    for (p, l) in seg.u8("prediction").chunks(pixels).zip(seg.u8("label").chunks(pixels)) {
        let mut one = Confusion::new(seg.number("classes") as usize);
        one.add(p, l);
        confusion.merge(&one);
    }
    assert_eq!(confusion.counts.iter().map(|n| *n as f64).collect::<Vec<_>>(), seg.f64("confusion"));
    for (class, (got, want)) in confusion.iou().into_iter().zip(seg.f64("iou")).enumerate() {
        match got {
            Some(got) => close(&format!("class {class}"), &[got], &[*want], seg.rtol, seg.atol),
            None => assert!(want.is_nan(), "class {class} occurs"),
        }
    }
    seg.check("miou", &[confusion.mean_iou()]);
    seg.check("pixel_accuracy", &[confusion.pixel_accuracy()]);

    let depth = case("depth");
    let mut truth = depth.f32("truth");
    truth.iter_mut().zip(depth.u8("valid")).filter(|(_, valid)| *valid == 0).for_each(|(t, _)| *t = 0.0);
    let mut figures = Depth::default();
    figures.add(&depth.f32("prediction"), &truth);
    for (k, near) in figures.near().into_iter().enumerate() {
        depth.check(&format!("pct_{}", k + 1), &[near]);
    }
    depth.check("rms", &[figures.rms()]);
    depth.check("rel", &[figures.relative()]);
}

#[test]
fn spectra() {
    for case in cases("spectrum_") {
        let z = features(&case, "z");
        case.check("rankme", &[spectrum::rankme(&z)]);
        case.check("covariance_eigenvalues", &spectrum::covariance_eigenvalues(&z));
        for key in ["alpha_all", "alpha_range"] {
            let [first, last] = case.range(key);
            case.check(key, &[spectrum::alpha_req(&z, first, last).expect("there are eigenvalues")]);
        }
    }
    let case = case("lidar");
    case.check("lidar", &[spectrum::lidar(&features(&case, "z"), case.shape("z")[1])]);
}

#[test]
fn alignment_and_uniformity() {
    let case = case("align_uniform");
    let (x, y) = (features(&case, "x"), features(&case, "y"));
    case.check("alignment", &[sphere::alignment(&x, &y)]);
    case.check("uniformity_x", &[sphere::uniformity(&x)]);
    case.check("uniformity_y", &[sphere::uniformity(&y)]);
}
