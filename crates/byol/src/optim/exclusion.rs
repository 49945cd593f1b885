//! Parameters that weight decay and layer-wise adaptation skip: every bias, and every scale and
//! shift of a norm. Their updates are plain momentum with the full learning rate. Source:
//! deepmind-research `byol`.

/// Returns `true` if the parameter with this name (torchvision's scheme) is excluded.
pub(crate) fn is_excluded(name: &str) -> bool {
    let (parent, last) = name.rsplit_once('.').unwrap_or(("", name));
    let layer = parent.rsplit('.').next().unwrap_or("");
    last == "bias" || layer.starts_with("bn") || parent.ends_with("downsample.1")
}

#[cfg(test)]
mod tests {
    use super::is_excluded;

    #[test]
    fn excludes_biases_and_norms_but_not_weights() {
        for name in
            ["bn1.weight", "layer1.0.bn2.bias", "layer2.0.downsample.1.weight", "projector.bn.weight", "fc1.bias"]
        {
            assert!(is_excluded(name), "{name}");
        }
        for name in ["conv1.weight", "layer2.0.downsample.0.weight", "projector.fc1.weight", "predictor.fc2.weight"] {
            assert!(!is_excluded(name), "{name}");
        }
    }
}
