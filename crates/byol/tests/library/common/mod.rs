//! Reads the golden fixtures and compares with their stated tolerances.

use std::{collections::HashMap, fs, io::Write, path::PathBuf, sync::OnceLock};

use burn::tensor::{Device, Tensor, TensorData};
use safetensors::{Dtype, SafeTensors};
use serde_json::Value;

/// The device under test: the CPU, or with `BYOL_TEST_DEVICE=wgpu` the GPU (feature `gpu`).
pub fn device() -> Device {
    #[cfg(feature = "gpu")]
    if std::env::var("BYOL_TEST_DEVICE").is_ok_and(|d| d == "wgpu") {
        return byol::device::open(byol::device::DeviceChoice::Wgpu).expect("a Vulkan driver, software or not").device;
    }
    Device::flex()
}

/// Reports a skipped test on stderr, past the capture of the test harness. With `BYOL_REQUIRE_ALL`
/// set, fails instead.
pub fn skip(test: &str, reason: &str) {
    assert!(std::env::var_os("BYOL_REQUIRE_ALL").is_none(), "{reason}");
    let _ = writeln!(std::io::stderr(), "SKIPPED {test}: {reason}");
}

fn folder() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../golden")
}

fn index() -> &'static Value {
    static INDEX: OnceLock<Value> = OnceLock::new();
    INDEX.get_or_init(|| {
        let text = fs::read_to_string(folder().join("index.json")).expect("golden/index.json is in the repository");
        serde_json::from_str(&text).expect("the index is JSON")
    })
}

/// One case: parameters, tolerance, tensors.
pub struct Case {
    pub name: String,
    pub rtol: f64,
    pub atol: f64,
    params: Value,
    tensors: HashMap<String, (Vec<usize>, Vec<f64>)>,
}

/// All cases whose names begin with `prefix`, in the index's order. At least one, or the fixture is
/// missing.
pub fn cases(prefix: &str) -> Vec<Case> {
    let all = index()["cases"].as_array().expect("a list of cases");
    let cases: Vec<Case> =
        all.iter().filter(|c| c["case"].as_str().is_some_and(|n| n.starts_with(prefix))).map(read).collect();
    assert!(!cases.is_empty(), "no case named {prefix}…");
    cases
}

/// The case of exactly this name.
pub fn case(name: &str) -> Case {
    cases(name).into_iter().find(|c| c.name == name).unwrap_or_else(|| panic!("no case named {name}"))
}

fn read(entry: &Value) -> Case {
    let name = entry["case"].as_str().expect("a name").to_owned();
    let bytes =
        fs::read(folder().join(entry["file"].as_str().expect("a file"))).expect("the fixture is in the repository");
    let file = SafeTensors::deserialize(&bytes).expect("the fixture is safetensors");
    let tensors = entry["tensors"].as_object().expect("tensors").keys().map(|key| {
        let view = file.tensor(&format!("{name}/{key}")).expect("the tensor is in the file");
        let data = view.data();
        let values: Vec<f64> = match view.dtype() {
            Dtype::F64 => data.chunks_exact(8).map(|b| f64::from_le_bytes(b.try_into().unwrap())).collect(),
            Dtype::F32 => data.chunks_exact(4).map(|b| f64::from(f32::from_le_bytes(b.try_into().unwrap()))).collect(),
            Dtype::I64 => data.chunks_exact(8).map(|b| i64::from_le_bytes(b.try_into().unwrap()) as f64).collect(),
            Dtype::U8 | Dtype::BOOL => data.iter().map(|b| f64::from(*b)).collect(),
            other => panic!("{name}/{key}: {other:?}"),
        };
        (key.clone(), (view.shape().to_vec(), values))
    });
    Case {
        rtol: entry["tolerance"]["rtol"].as_f64().unwrap(),
        atol: entry["tolerance"]["atol"].as_f64().unwrap(),
        params: entry["params"].clone(),
        tensors: tensors.collect(),
        name,
    }
}

impl Case {
    pub fn number(&self, key: &str) -> f64 {
        self.params[key].as_f64().unwrap_or_else(|| panic!("{} has no number {key}", self.name))
    }

    pub fn flag(&self, key: &str) -> bool {
        self.params[key].as_bool().unwrap_or_else(|| panic!("{} has no flag {key}", self.name))
    }

    /// A parameter `[first, last]`.
    pub fn range(&self, key: &str) -> [usize; 2] {
        let of = |i: usize| self.params[key][i].as_u64().unwrap_or_else(|| panic!("{} has no range {key}", self.name));
        [of(0), of(1)].map(|v| v as usize)
    }

    pub fn has(&self, key: &str) -> bool {
        self.tensors.contains_key(key)
    }

    pub fn keys(&self) -> impl Iterator<Item = &String> {
        self.tensors.keys()
    }

    pub fn shape(&self, key: &str) -> &[usize] {
        &self.entry(key).0
    }

    pub fn f64(&self, key: &str) -> &[f64] {
        &self.entry(key).1
    }

    pub fn f32(&self, key: &str) -> Vec<f32> {
        self.f64(key).iter().map(|v| *v as f32).collect()
    }

    pub fn u8(&self, key: &str) -> Vec<u8> {
        self.f64(key).iter().map(|v| *v as u8).collect()
    }

    pub fn usize(&self, key: &str) -> Vec<usize> {
        self.f64(key).iter().map(|v| *v as usize).collect()
    }

    pub fn tensor<const D: usize>(&self, key: &str, device: &Device) -> Tensor<D> {
        Tensor::from_data(TensorData::new(self.f32(key), self.shape(key).to_vec()), device)
    }

    fn entry(&self, key: &str) -> &(Vec<usize>, Vec<f64>) {
        self.tensors.get(key).unwrap_or_else(|| panic!("{} has no tensor {key}", self.name))
    }

    /// |got − want| ≤ atol + rtol · max|want|.
    pub fn check<T: Copy + Into<f64>>(&self, key: &str, got: &[T]) {
        close(&format!("{}/{key}", self.name), got, self.f64(key), self.rtol, self.atol);
    }
}

pub fn close<T: Copy + Into<f64>>(what: &str, got: &[T], want: &[f64], rtol: f64, atol: f64) {
    assert_eq!(got.len(), want.len(), "{what}: length");
    let bound = atol + rtol * want.iter().fold(0.0f64, |m, v| m.max(v.abs()));
    for (i, (g, w)) in got.iter().zip(want).enumerate() {
        let g: f64 = (*g).into();
        assert!(
            (g - w).abs() <= bound,
            "{what}[{i}]: got {g}, want {w}, off by {:e}, allowed {bound:e}",
            (g - w).abs()
        );
    }
}
