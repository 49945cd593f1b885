//! Which device computes, and what this machine has. All that differs from device to device is decided here.
//!
//! The CPU is always there. GPUs that need no vendor toolkit (Vulkan, Metal, DX12, by wgpu) come with the feature `gpu`; NVIDIA's and AMD's own
//! toolkits with `cuda` and `rocm`. [`Choice::Auto`] takes a real GPU where there is one, never a software rasteriser, else the CPU.

use std::str::FromStr;

use burn::{
    backend::{Backend, DTypeUsage, Dispatch},
    tensor::{DType, Device, FloatDType, Tensor, TensorData, module::conv2d, ops::ConvOptions},
};
use byol_kernels::{
    awake::Awake,
    isa::{self, Isa},
};
use serde::{Deserialize, Serialize};

use crate::guarded::guarded;

/// What the user asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Choice {
    /// A real GPU if there is one, else the CPU.
    #[default]
    Auto,
    /// The CPU.
    Cpu,
    /// A GPU by Vulkan.
    Vulkan,
    /// A GPU by Metal.
    Metal,
    /// A GPU by whatever API wgpu finds.
    Wgpu,
    /// An NVIDIA GPU by CUDA.
    Cuda,
    /// An AMD GPU by ROCm.
    Rocm,
}

impl Choice {
    /// The names that `--device` takes.
    pub const NAMES: [&str; 7] = ["auto", "cpu", "vulkan", "metal", "wgpu", "cuda", "rocm"];
}

impl FromStr for Choice {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, String> {
        Ok(match name {
            "auto" => Choice::Auto,
            "cpu" => Choice::Cpu,
            "vulkan" => Choice::Vulkan,
            "metal" => Choice::Metal,
            "wgpu" => Choice::Wgpu,
            "cuda" => Choice::Cuda,
            "rocm" => Choice::Rocm,
            _ => return Err(format!("a device is one of {}", Choice::NAMES.join(", "))),
        })
    }
}

/// What convolutions and linear layers multiply. Statistics, loss, weights, momenta and target are f32 with all; so are sums and
/// activations on the CPU, while on a GPU activations are kept as they are multiplied.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Precision {
    /// 24 bits of fraction.
    #[default]
    F32,
    /// 8 bits of fraction: faster where the processor multiplies such numbers (AVX512-BF16) or the GPU has units for them, and coarser.
    Bf16,
    /// 11 bits of fraction over a small range, on GPUs: the loss is scaled while it is differentiated ([`crate::optim::LossScale`]).
    F16,
}

impl Precision {
    /// As recipes and the command line have it.
    pub fn name(self) -> &'static str {
        match self {
            Precision::F32 => "f32",
            Precision::Bf16 => "bf16",
            Precision::F16 => "f16",
        }
    }

    /// What tensors of it hold.
    pub fn dtype(self) -> FloatDType {
        match self {
            Precision::F32 => FloatDType::F32,
            Precision::Bf16 => FloatDType::BF16,
            Precision::F16 => FloatDType::F16,
        }
    }
}

/// Why there is no such device.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The program was built without it.
    #[error(
        "this byol was built without {what}; build it with `cargo build --release --features {feature}`, or use --device cpu"
    )]
    NotBuilt {
        /// What is missing.
        what: &'static str,
        /// The feature that brings it.
        feature: &'static str,
    },
    /// The machine has none.
    #[error("no {what} device on this machine; `byol devices` lists what there is, --device cpu always works")]
    NotFound {
        /// What was asked for.
        what: &'static str,
    },
    /// `BYOL_ISA` names an instruction set that the processor has not.
    #[error(transparent)]
    InstructionSet(#[from] isa::Missing),
    /// The device has no such numbers.
    #[error("{device} computes no {precision}{what}; use --precision {instead}")]
    Precision {
        /// Its name.
        device: String,
        /// As asked for.
        precision: &'static str,
        /// What it lacks, if that has a name, or what went wrong.
        what: String,
        /// What it does compute.
        instead: &'static str,
    },
    /// It is there but does not start.
    #[error("{name} does not start: {reason}; update its driver or use --device cpu")]
    DoesNotStart {
        /// The device.
        name: String,
        /// What the driver said.
        reason: String,
    },
}

/// What kind of hardware a device is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    /// The processor.
    Cpu,
    /// A graphics processor.
    Gpu,
    /// A graphics driver that computes on the processor. For tests; never taken by `auto`.
    Software,
}

/// A device of this machine.
#[derive(Debug, Clone, Serialize)]
pub struct Found {
    /// What to give to `--device`.
    pub choice: &'static str,
    /// As the driver names it.
    pub name: String,
    /// Processor, GPU or software.
    pub kind: Kind,
}

/// An opened device.
#[derive(Debug, Clone)]
pub struct Opened {
    /// To make tensors on.
    pub device: Device,
    /// What it is.
    pub found: Found,
}

/// Whether the fused kernels of `byol-kernels` compute on this device; elsewhere layers are composed of Burn's operations.
pub fn has_kernels(device: &Device) -> bool {
    matches!(device.clone().without_autodiff().as_dispatch(), burn::backend::DispatchDevice::Flex(_))
}

/// Holds the threads ready while a step computes on the processor; nothing elsewhere.
pub(crate) fn at_work(device: &Device) -> Option<Awake> {
    has_kernels(device).then(Awake::new)
}

/// The processor, its instruction set and the memory.
#[derive(Debug, Clone, Serialize)]
pub struct Machine {
    /// The processor's name.
    pub cpu: String,
    /// Threads that can run at once.
    pub cores: usize,
    /// The vector instructions that compute: `avx512`, `avx2`, `neon` or `portable`; the widest unless `BYOL_ISA` names others.
    pub isa: &'static str,
    /// Whether products of bf16 are faster than those of f32 (AVX512-BF16).
    pub bf16: bool,
    /// Memory in MiB.
    pub memory_mb: u64,
    /// Free memory in MiB.
    pub free_mb: u64,
}

/// Whether this process may use some of the machine's processors only, as launchers of many processes arrange it.
pub fn is_bound() -> bool {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let list = status.lines().find_map(|line| line.strip_prefix("Cpus_allowed_list:"));
    let count = |range: &str| {
        let (first, last) = range.split_once('-').unwrap_or((range, range));
        Some(last.trim().parse::<usize>().ok()? - first.trim().parse::<usize>().ok()? + 1)
    };
    let allowed = list.and_then(|list| list.split(',').map(count).sum::<Option<usize>>());
    let online = std::fs::read_to_string("/sys/devices/system/cpu/online").unwrap_or_default();
    let online = online.split(',').map(count).sum::<Option<usize>>();
    matches!((allowed, online), (Some(allowed), Some(online)) if allowed < online)
}

/// Looks at this machine.
pub fn machine() -> Machine {
    let system = sysinfo::System::new().ok().map(|mut system| {
        system.refresh_memory();
        system.refresh_cpu_list(sysinfo::CpuRefreshKind::nothing());
        system
    });
    let cpu = system.as_ref().and_then(|s| s.cpus().first()).map_or("", |c| c.brand().trim());
    let isa = isa::choose().unwrap_or(isa::available()[0]);
    Machine {
        cpu: if cpu.is_empty() { std::env::consts::ARCH.to_owned() } else { cpu.to_owned() },
        cores: std::thread::available_parallelism().map_or(1, |n| n.get()),
        isa: isa.name,
        bf16: isa.name != "portable" && isa::halves_of(isa).is_some(),
        // 0 where the system does not say: then no decoded image is kept in memory.
        memory_mb: system.as_ref().map_or(0, |s| s.total_memory() >> 20),
        free_mb: system.as_ref().map_or(0, |s| s.available_memory() >> 20),
    }
}

fn cpu() -> Opened {
    Opened { device: Device::flex(), found: Found { choice: "cpu", name: machine().cpu, kind: Kind::Cpu } }
}

/// Every device that this build can use here, the CPU first.
pub fn list() -> Vec<Found> {
    #[allow(unused_mut, reason = "a build without GPU features lists the CPU alone")]
    let mut all = vec![cpu().found];
    #[cfg(feature = "gpu")]
    all.extend(gpu::adapters().into_iter().map(|a| a.found));
    #[cfg(feature = "cuda")]
    all.extend(toolkit("cuda", 0).map(|(_, found)| found));
    #[cfg(feature = "rocm")]
    all.extend(toolkit("rocm", 0).map(|(_, found)| found));
    all
}

/// Opens a device.
///
/// # Errors
/// Any [`Error`]; for `auto` and `cpu` [`Error::InstructionSet`] alone.
pub fn open(choice: Choice) -> Result<Opened, Error> {
    open_nth(choice, 0)
}

/// Opens the `nth` of the devices that suit, from 0, over again where they are fewer: one for each process of a machine.
///
/// # Errors
/// As [`open`].
pub fn open_nth(choice: Choice, nth: usize) -> Result<Opened, Error> {
    isa::choose()?;
    match choice {
        Choice::Cpu => Ok(cpu()),
        Choice::Auto => Ok(auto(nth)),
        Choice::Vulkan => graphics(Some("vulkan"), nth),
        Choice::Metal => graphics(Some("metal"), nth),
        Choice::Wgpu => graphics(None, nth),
        #[cfg(feature = "cuda")]
        Choice::Cuda => toolkit("cuda", nth)
            .map(|(i, found)| Opened { device: Device::cuda(i), found })
            .ok_or(Error::NotFound { what: "CUDA" }),
        #[cfg(feature = "rocm")]
        Choice::Rocm => toolkit("rocm", nth)
            .map(|(i, found)| Opened { device: Device::rocm(i), found })
            .ok_or(Error::NotFound { what: "ROCm" }),
        #[cfg(not(feature = "cuda"))]
        Choice::Cuda => Err(Error::NotBuilt { what: "CUDA", feature: "cuda" }),
        #[cfg(not(feature = "rocm"))]
        Choice::Rocm => Err(Error::NotBuilt { what: "ROCm", feature: "rocm" }),
    }
}

/// Whether training on this device can multiply so.
///
/// # Errors
/// [`Error::Precision`].
pub fn check(device: &Device, precision: Precision) -> Result<(), Error> {
    if has_kernels(device) {
        return kernels(precision).map(|_| ());
    }
    if precision == Precision::F32 {
        return Ok(());
    }
    let has = |precision: Precision| device.supports_dtype(DType::from(precision.dtype()));
    let refuse = |what: String| {
        let device = name_of(device);
        let f16 = precision == Precision::Bf16 && has(Precision::F16);
        let instead = if f16 { "f16" } else { "f32" };
        Err(Error::Precision { device, precision: precision.name(), what, instead })
    };
    if !has(precision) {
        return refuse(String::new());
    }
    match tried(device, precision) {
        Ok(off) if off <= MOST_OFF => Ok(()),
        Ok(off) => refuse(format!(" rightly (a convolution is off by {:.0} %)", 100.0 * off)),
        Err(why) => refuse(format!(" without failing ({why})")),
    }
}

#[cfg(any(feature = "gpu", feature = "cuda", feature = "rocm"))]
fn name_of(device: &Device) -> String {
    device.identity().map_or_else(|| format!("{device:?}"), |identity| identity.name)
}

#[cfg(not(any(feature = "gpu", feature = "cuda", feature = "rocm")))]
fn name_of(device: &Device) -> String {
    format!("{device:?}")
}

/// How far a product of 16 bits may be from that of f32, as a share of the largest: some sixteen roundings of bf16.
const MOST_OFF: f64 = 0.06;

/// A small convolution and its gradient in this precision: how far they are from those in f32. Drivers differ in what they say
/// of themselves, so what counts is what comes out.
fn tried(device: &Device, precision: Precision) -> Result<f64, String> {
    let wave = |n: usize, shape: [usize; 4]| {
        let values: Vec<f32> = (0..n).map(|i| (0.7 * i as f32).sin()).collect();
        Tensor::<4>::from_data(TensorData::new(values, shape), device)
    };
    let outcome = |kind: FloatDType| {
        let x = wave(2 * 8 * 64, [2, 8, 8, 8]).cast(kind);
        let w = wave(8 * 8 * 9, [8, 8, 3, 3]).autodiff().require_grad();
        let y = conv2d(x.autodiff(), w.clone().cast(kind), None, ConvOptions::new([1, 1], [1, 1], [1, 1], 1));
        let y = y.cast(FloatDType::F32);
        let dw = w.grad(&y.clone().square().mean().backward());
        let dw = dw.map_or_else(|| w.clone().without_autodiff().zeros_like(), |g| g.cast(FloatDType::F32));
        [y.without_autodiff(), dw].map(|t| t.into_data_as::<f32>().try_into_vec::<f32>().unwrap_or_default())
    };
    let compared = || {
        let off = |(a, b): (&Vec<f32>, &Vec<f32>)| {
            let largest = a.iter().fold(0.0f32, |m, v| m.max(v.abs()));
            let apart = a.iter().zip(b).map(|(a, b)| (a - b).abs());
            // A value that is no number is as far off as can be.
            let apart = apart.fold(0.0f32, |m, d| if m.is_nan() || d <= m { m } else { d });
            if b.len() == a.len() && apart.is_finite() { f64::from(apart / largest) } else { 1.0 }
        };
        let (exact, coarse) = (outcome(FloatDType::F32), outcome(precision.dtype()));
        exact.iter().zip(&coarse).map(off).fold(0.0, f64::max)
    };
    guarded(compared)
}

/// Whether training with bf16 is faster here: AVX512-BF16 in a processor, units for products of matrices in a GPU that computes right.
pub fn prefers_bf16(opened: &Opened) -> bool {
    match opened.found.kind {
        Kind::Cpu => machine().bf16,
        Kind::Software => false,
        Kind::Gpu => {
            let usage = Dispatch::dtype_usage(opened.device.as_dispatch(), DType::BF16);
            usage.contains(DTypeUsage::Accelerated) && check(&opened.device, Precision::Bf16).is_ok()
        }
    }
}

/// The processor's kernels that multiply so.
///
/// # Errors
/// [`Error::InstructionSet`], [`Error::Precision`].
pub fn kernels(precision: Precision) -> Result<&'static Isa, Error> {
    let isa = isa::choose()?;
    let refuse = |what: &str, instead| {
        let (device, precision) = (machine().cpu, precision.name());
        Error::Precision { device, precision, what: what.into(), instead }
    };
    match precision {
        Precision::F32 => Ok(isa),
        Precision::Bf16 => isa::halves_of(isa).ok_or_else(|| refuse(" (AVX512-BF16)", "f32")),
        Precision::F16 if isa::halves_of(isa).is_some() => Err(refuse("", "bf16")),
        Precision::F16 => Err(refuse("", "f32")),
    }
}

/// The `nth` real GPU, toolkits before graphics APIs, or the next that starts, else the CPU.
#[cfg_attr(not(any(feature = "gpu", feature = "cuda", feature = "rocm")), allow(unused_variables))]
fn auto(nth: usize) -> Opened {
    #[cfg(feature = "cuda")]
    if let Ok(opened) = open_nth(Choice::Cuda, nth) {
        return opened;
    }
    #[cfg(feature = "rocm")]
    if let Ok(opened) = open_nth(Choice::Rocm, nth) {
        return opened;
    }
    #[cfg(feature = "gpu")]
    {
        let mut real: Vec<_> = gpu::adapters().into_iter().filter(|a| a.found.kind == Kind::Gpu).collect();
        let n = real.len().max(1);
        real.rotate_left(nth % n);
        if let Some(opened) = real.iter().find_map(|adapter| adapter.open().ok()) {
            return opened;
        }
    }
    cpu()
}

#[cfg(feature = "gpu")]
fn graphics(api: Option<&'static str>, nth: usize) -> Result<Opened, Error> {
    let adapters = gpu::adapters();
    let suits = |a: &&gpu::Adapter| api.is_none_or(|api| a.found.choice == api);
    // A real GPU before a software driver.
    let real: Vec<_> = adapters.iter().filter(suits).filter(|a| a.found.kind == Kind::Gpu).collect();
    match real.get(nth % real.len().max(1)).copied().or_else(|| adapters.iter().find(suits)) {
        Some(adapter) => adapter.open(),
        None => Err(Error::NotFound { what: api.unwrap_or("graphics") }),
    }
}

#[cfg(not(feature = "gpu"))]
fn graphics(_api: Option<&'static str>, _nth: usize) -> Result<Opened, Error> {
    Err(Error::NotBuilt { what: "GPU support", feature: "gpu" })
}

/// The `nth` device of a vendor's toolkit, with its number.
#[cfg(any(feature = "cuda", feature = "rocm"))]
fn toolkit(which: &'static str, nth: usize) -> Option<(usize, Found)> {
    use burn::tensor::DeviceType;
    let kind = match which {
        #[cfg(feature = "cuda")]
        "cuda" => DeviceType::Cuda,
        #[cfg(feature = "rocm")]
        "rocm" => DeviceType::Rocm,
        _ => return None,
    };
    let devices = Device::enumerate(kind);
    let n = devices.iter().count();
    let number = nth.checked_rem(n)?;
    let device = devices.iter().nth(number)?;
    let name = device.identity().map_or_else(|| which.to_owned(), |identity| identity.name);
    Some((number, Found { choice: which, name, kind: Kind::Gpu }))
}

#[cfg(feature = "gpu")]
mod gpu {
    use burn::tensor::{
        Device, DeviceKind,
        wgpu::{WgpuBackend, wgpu},
    };

    use super::{Error, Found, Kind, Opened};

    /// An adapter as wgpu lists it.
    pub struct Adapter {
        pub found: Found,
        kind: DeviceKind,
        api: WgpuBackend,
    }

    /// All adapters of the compute-capable APIs, numbered kind by kind as Burn numbers them.
    pub fn adapters() -> Vec<Adapter> {
        let apis = [
            ("metal", wgpu::Backends::METAL, WgpuBackend::Metal),
            ("vulkan", wgpu::Backends::VULKAN, WgpuBackend::Vulkan),
            ("wgpu", wgpu::Backends::DX12, WgpuBackend::Dx12),
        ];
        let instance = wgpu::Instance::default();
        let mut all = Vec::new();
        for (choice, backends, api) in apis {
            let (mut discrete, mut integrated, mut shared) = (0, 0, 0);
            let next = |n: &mut usize| {
                *n += 1;
                *n - 1
            };
            for adapter in pollster::block_on(instance.enumerate_adapters(backends)) {
                let info = adapter.get_info();
                let (kind, hardware) = match info.device_type {
                    wgpu::DeviceType::DiscreteGpu => (DeviceKind::DiscreteGpu(next(&mut discrete)), Kind::Gpu),
                    wgpu::DeviceType::IntegratedGpu => (DeviceKind::IntegratedGpu(next(&mut integrated)), Kind::Gpu),
                    wgpu::DeviceType::VirtualGpu => (DeviceKind::VirtualGpu(next(&mut shared)), Kind::Gpu),
                    wgpu::DeviceType::Cpu => (DeviceKind::Cpu, Kind::Software),
                    wgpu::DeviceType::Other => continue, // nothing says that it computes
                };
                all.push(Adapter { found: Found { choice, name: info.name, kind: hardware }, kind, api });
            }
        }
        all
    }

    impl Adapter {
        pub fn open(&self) -> Result<Opened, Error> {
            use std::{collections::HashMap, sync::Mutex};
            // A runtime starts once a process; later calls get the same.
            static STARTED: Mutex<Option<HashMap<String, Device>>> = Mutex::new(None);
            let mut started = STARTED.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
            let started = started.get_or_insert_default();
            let key = format!("{:?} {:?}", self.kind, self.api);
            if !started.contains_key(&key) {
                let options = Device::wgpu_options().device_kind(self.kind.clone()).graphics_api(self.api);
                let device = options
                    .init()
                    .map_err(|e| Error::DoesNotStart { name: self.found.name.clone(), reason: e.to_string() })?;
                started.insert(key.clone(), device);
            }
            Ok(Opened { device: started[&key].clone(), found: self.found.clone() })
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn auto_never_takes_a_software_driver() {
        assert_ne!(open(Choice::Auto).unwrap().found.kind, Kind::Software);
    }

    #[test]
    fn every_listed_name_is_a_choice() {
        for name in Choice::NAMES {
            assert!(name.parse::<Choice>().is_ok(), "{name}");
        }
        assert!("gpu".parse::<Choice>().is_err());
    }

    #[cfg(not(feature = "gpu"))]
    #[test]
    fn a_missing_feature_is_named() {
        assert!(open(Choice::Vulkan).unwrap_err().to_string().contains("--features gpu"));
    }
}
