//! Evaluation metrics against the golden oracle, within its tolerances.

use crate::common::{Case, case, cases, close};
use byol::eval::{
    Features, alignment_uniformity, effective_rank, knn, logistic,
    metrics::{self, ConfusionMatrix, DepthErrors},
};

fn features(case: &Case, key: &str) -> Features {
    let shape = case.shape(key);
    let dim = shape[shape.len() - 1];
    Features { n: shape.iter().product::<usize>() / dim, dim, values: case.f32(key) }
}

fn flags(case: &Case, key: &str) -> Vec<bool> {
    case.u8(key).iter().map(|v| *v != 0).collect()
}

#[test]
fn knn_matches_oracle() {
    for case in cases("knn_") {
        let classes = case.number("classes") as usize;
        let (bank, queries) = (features(&case, "train"), features(&case, "test"));
        let (bank_labels, labels) = (case.usize("train_labels"), case.usize("test_labels"));
        let k = case.number("k") as usize;
        // With a second k, which shares the neighbor search.
        let ks = [1, k];
        let temperature = case.number("temperature");
        let actual = &knn::classify_with_ks(&bank, &bank_labels, &queries, &labels, classes, &ks, temperature)[1];
        assert_eq!(actual.predicted, case.usize("prediction"), "{}", case.name);
        case.check("accuracy", &[actual.accuracy]);
        for (row, (a, e)) in actual.votes.chunks(classes).zip(case.f64("votes").chunks(classes)).enumerate() {
            close(&format!("{} row {row}", case.name), a, e, case.rtol, case.atol);
        }
    }
}

#[test]
fn logistic_regression_matches_oracle() {
    for case in cases("logreg_") {
        let classes = case.number("classes") as usize;
        let x = features(&case, "x");
        let fit = logistic::fit(&x, &case.usize("y"), classes, case.number("l2"));
        close(&case.name, &[fit.objective], case.f64("objective"), 1e-8, 0.0);
        // The oracle's weights are [F, classes].
        let transposed: Vec<f64> = (0..x.dim)
            .flat_map(|d| (0..classes).map(move |k| (d, k)))
            .map(|(d, k)| fit.classifier.w[k * x.dim + d])
            .collect();
        case.check("weight", &transposed);
        case.check("bias", &fit.classifier.b);
        let mut probabilities = fit.classifier.scores(&features(&case, "x_test"));
        for row in probabilities.chunks_exact_mut(classes) {
            let max = row.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            row.iter_mut().for_each(|z| *z = (*z - max).exp());
            let sum: f64 = row.iter().sum();
            row.iter_mut().for_each(|z| *z /= sum);
        }
        case.check("probabilities", &probabilities);
    }
}

#[test]
fn accuracies_match_oracle() {
    let per_class = case("mean_per_class");
    let (predicted, labels) = (per_class.usize("prediction"), per_class.usize("label"));
    let classes = per_class.number("classes") as usize;
    per_class.check("mean_per_class", &[metrics::mean_per_class(&predicted, &labels, classes)]);
    per_class.check("overall", &[metrics::accuracy(&predicted, &labels)]);
    let top_k = case("topk");
    let (scores, labels, classes) = (top_k.f64("logits"), top_k.usize("labels"), top_k.shape("logits")[1]);
    for k in [1, 5] {
        let hits = metrics::top_k_hits(scores, &labels, classes, k);
        let rate = hits.iter().filter(|h| **h).count() as f64 / hits.len() as f64;
        top_k.check(&format!("top{k}"), &[rate]);
    }
    top_k.check("top1", &[metrics::accuracy(&metrics::argmax(scores, classes), &labels)]);
}

#[test]
fn average_precision_matches_oracle() {
    let case = case("voc_map");
    let classes = case.shape("score")[1];
    let (positive, ignore) = (flags(&case, "positive"), flags(&case, "ignore"));
    let average_precision = |class: usize, keep: &dyn Fn(usize) -> bool| {
        let indices: Vec<usize> = (0..positive.len()).filter(|i| i % classes == class && keep(*i)).collect();
        let scores: Vec<f64> = indices.iter().map(|i| case.f64("score")[*i]).collect();
        let positive: Vec<bool> = indices.iter().map(|i| positive[*i]).collect();
        metrics::average_precision_11(&scores, &positive).expect("every class has a positive")
    };
    let all: Vec<f64> = (0..classes).map(|c| average_precision(c, &|_| true)).collect();
    case.check("ap11", &all);
    case.check("map11", &[metrics::mean(all.into_iter())]);
    let kept: Vec<f64> = (0..classes).map(|c| average_precision(c, &|i| !ignore[i])).collect();
    case.check("ap11_ignore", &kept);
    case.check("map11_ignore", &[metrics::mean(kept.into_iter())]);
    assert_eq!(metrics::average_precision_11(&[0.5, 0.2], &[false, false]), None);
}

#[test]
fn segmentation_metrics_match_oracle() {
    let case = case("miou");
    let classes = case.number("classes") as usize;
    let mut confusion = ConfusionMatrix::new(classes);
    // Merged image by image, as in an evaluation.
    let pixels = case.shape("label")[1..].iter().product();
    for (p, l) in case.u8("prediction").chunks(pixels).zip(case.u8("label").chunks(pixels)) {
        confusion.merge(&ConfusionMatrix::from_image(p, l, classes));
    }
    assert_eq!(confusion.counts.iter().map(|n| *n as f64).collect::<Vec<_>>(), case.f64("confusion"));
    for (class, (actual, expected)) in confusion.iou().into_iter().zip(case.f64("iou")).enumerate() {
        match actual {
            Some(actual) => close(&format!("class {class}"), &[actual], &[*expected], case.rtol, case.atol),
            None => assert!(expected.is_nan(), "class {class} occurs"),
        }
    }
    case.check("miou", &[confusion.mean_iou()]);
    case.check("pixel_accuracy", &[confusion.pixel_accuracy()]);
}

#[test]
fn depth_metrics_match_oracle() {
    let case = case("depth");
    let mut truth = case.f32("truth");
    truth.iter_mut().zip(case.u8("valid")).filter(|(_, valid)| *valid == 0).for_each(|(t, _)| *t = 0.0);
    let mut errors = DepthErrors::default();
    errors.add(&case.f32("prediction"), &truth);
    for (k, accuracy) in errors.threshold_accuracies().into_iter().enumerate() {
        case.check(&format!("pct_{}", k + 1), &[accuracy]);
    }
    case.check("rms", &[errors.rms()]);
    case.check("rel", &[errors.mean_relative()]);
}

#[test]
fn spectral_metrics_match_oracle() {
    for case in cases("spectrum_") {
        let z = features(&case, "z");
        case.check("rankme", &[effective_rank::rankme(&z)]);
        case.check("covariance_eigenvalues", &effective_rank::covariance_eigenvalues(&z));
        for key in ["alpha_all", "alpha_range"] {
            let [first, last] = case.range(key);
            case.check(key, &[effective_rank::alpha_req(&z, first, last).expect("at least two eigenvalues")]);
        }
    }
    let case = case("lidar");
    case.check("lidar", &[effective_rank::lidar(&features(&case, "z"), case.shape("z")[1])]);
}

#[test]
fn alignment_and_uniformity_match_oracle() {
    let case = case("align_uniform");
    let (x, y) = (features(&case, "x"), features(&case, "y"));
    case.check("alignment", &[alignment_uniformity::alignment(&x, &y)]);
    case.check("uniformity_x", &[alignment_uniformity::uniformity(&x)]);
    case.check("uniformity_y", &[alignment_uniformity::uniformity(&y)]);
}
