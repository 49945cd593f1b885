//! Compute devices and properties of the machine. All device-dependent decisions are made here.
//!
//! The CPU is always available. The feature `gpu` adds GPUs without a vendor toolkit (Vulkan, Metal
//! and DX12, through wgpu), `cuda` and `rocm` those of NVIDIA and AMD. [`DeviceChoice::Auto`]
//! selects a hardware GPU if there is one, never a software rasterizer, and the CPU otherwise.

use std::str::FromStr;

use burn::{
    backend::{Backend, DTypeUsage, Dispatch},
    tensor::{DType, Device, FloatDType, Tensor, TensorData, module::conv2d, ops::ConvOptions},
};
use byol_kernels::{
    isa::{self, Isa},
    spin::KeepAwake,
};
use serde::{Deserialize, Serialize};

use crate::catch_panic::catch_panic;

/// A requested device.
///
/// # Examples
///
/// ```
/// use byol::DeviceChoice;
///
/// assert_eq!("cpu".parse(), Ok(DeviceChoice::Cpu));
/// let device = byol::device::open(DeviceChoice::Cpu)?.device;
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum DeviceChoice {
    /// A hardware GPU if there is one, otherwise the CPU.
    #[default]
    Auto,
    /// The CPU.
    Cpu,
    /// A GPU through Vulkan.
    Vulkan,
    /// A GPU through Metal.
    Metal,
    /// A GPU through any API of wgpu.
    Wgpu,
    /// An NVIDIA GPU through CUDA.
    Cuda,
    /// An AMD GPU through ROCm.
    Rocm,
}

impl DeviceChoice {
    /// Values of `--device`.
    pub(crate) const NAMES: [&str; 7] = ["auto", "cpu", "vulkan", "metal", "wgpu", "cuda", "rocm"];
}

impl FromStr for DeviceChoice {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, String> {
        Ok(match name {
            "auto" => DeviceChoice::Auto,
            "cpu" => DeviceChoice::Cpu,
            "vulkan" => DeviceChoice::Vulkan,
            "metal" => DeviceChoice::Metal,
            "wgpu" => DeviceChoice::Wgpu,
            "cuda" => DeviceChoice::Cuda,
            "rocm" => DeviceChoice::Rocm,
            _ => return Err(format!("invalid device `{name}` (expected one of {})", DeviceChoice::NAMES.join(", "))),
        })
    }
}

/// Compute precision: the type of the operands of convolutions and linear layers.
///
/// Weights, momenta, target, batch-norm statistics and loss are always f32, and so are sums on the
/// CPU. In training, the maps of the encoder have the compute precision.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Precision {
    /// 24-bit significand.
    #[default]
    F32,
    /// 8-bit significand: less accurate, with half the memory for maps. Faster with AMX and on GPUs
    /// with bf16 matrix units. With AVX512-BF16 alone: faster on AMD, slower on Intel.
    Bf16,
    /// 11-bit significand with a small range, on GPUs only. Requires a loss scale
    /// (`optim::LossScale`).
    F16,
}

impl Precision {
    /// Name in recipes and on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Precision::F32 => "f32",
            Precision::Bf16 => "bf16",
            Precision::F16 => "f16",
        }
    }

    /// Element type of tensors.
    pub fn dtype(self) -> FloatDType {
        match self {
            Precision::F32 => FloatDType::F32,
            Precision::Bf16 => FloatDType::BF16,
            Precision::F16 => FloatDType::F16,
        }
    }
}

/// Errors of opening a device.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// This build does not support the device.
    #[error(
        "this byol was built without {what}\n\
         hint: install it with `cargo install --locked --path crates/cli --features {feature}`, or use `--device cpu`"
    )]
    NotBuilt {
        /// Missing support.
        what: &'static str,
        /// Feature that adds it.
        feature: &'static str,
    },
    /// The machine has no such device.
    #[error("no {what} device found\nhint: run `byol devices` to list the devices, or use `--device cpu`")]
    NotFound {
        /// Requested kind of device.
        what: &'static str,
    },
    /// `BYOL_ISA` names an instruction set that the processor does not have.
    #[error(transparent)]
    InstructionSet(#[from] isa::UnsupportedIsa),
    /// The device does not support the compute precision.
    #[error("{device} does not support {precision}{detail}\nhint: use `--precision {supported}`")]
    Precision {
        /// Name of the device.
        device: String,
        /// Requested precision.
        precision: &'static str,
        /// Missing hardware feature or failure, with punctuation; may be empty.
        detail: String,
        /// A supported precision.
        supported: &'static str,
    },
    /// The device fails to start.
    #[error("cannot start {name}: {reason}\nhint: update its driver, or use `--device cpu`")]
    DoesNotStart {
        /// Name of the device.
        name: String,
        /// Message of the driver.
        reason: String,
    },
}

/// Kind of hardware.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    /// The processor.
    Cpu,
    /// A graphics processor.
    Gpu,
    /// A graphics driver that computes on the processor. For tests; never selected by `auto`.
    Software,
}

/// A device of this machine.
#[derive(Debug, Clone, Serialize)]
pub struct DeviceInfo {
    /// Value of `--device`.
    pub choice: &'static str,
    /// Name reported by the driver.
    pub name: String,
    /// Kind of hardware.
    pub kind: Kind,
}

/// An opened device.
#[derive(Debug, Clone)]
pub struct OpenedDevice {
    /// Handle for creating tensors.
    pub device: Device,
    /// Description.
    pub info: DeviceInfo,
}

/// Returns `true` if layers run on the fused kernels of `byol-kernels`, which is the case on the
/// CPU. On other devices they are composed of Burn's operations.
pub fn has_kernels(device: &Device) -> bool {
    matches!(device.clone().without_autodiff().as_dispatch(), burn::backend::DispatchDevice::Flex(_))
}

/// Keeps the worker threads awake during a step on the CPU, until the guard is dropped; `None` on
/// other devices.
pub(crate) fn keep_awake(device: &Device) -> Option<KeepAwake> {
    has_kernels(device).then(KeepAwake::new)
}

/// Processor, instruction set and memory of the machine.
#[derive(Debug, Clone, Serialize)]
pub struct MachineInfo {
    /// Name of the processor.
    pub cpu: String,
    /// Number of threads that can run at once.
    pub cores: usize,
    /// Instruction set of the kernels: `avx512`, `avx2`, `neon` or `portable`. The widest, unless
    /// `BYOL_ISA` selects another.
    pub isa: &'static str,
    /// The processor multiplies bf16 (AMX, AVX512-BF16).
    pub bf16: bool,
    /// The kernels multiply bf16 on the matrix unit AMX.
    pub amx: bool,
    /// Total memory in MiB.
    pub memory_mb: u64,
    /// Free memory in MiB.
    pub free_mb: u64,
}

/// Returns `true` if this process is bound to a subset of the processors, as MPI launchers do.
/// Linux only.
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

/// Queries the machine.
pub fn machine() -> MachineInfo {
    let system = sysinfo::System::new().ok().map(|mut system| {
        system.refresh_memory();
        system.refresh_cpu_list(sysinfo::CpuRefreshKind::nothing());
        system
    });
    let cpu = system.as_ref().and_then(|s| s.cpus().first()).map_or("", |c| c.brand().trim());
    let isa = isa::choose().unwrap_or(isa::available()[0]);
    MachineInfo {
        cpu: if cpu.is_empty() { std::env::consts::ARCH.to_owned() } else { cpu.to_owned() },
        cores: std::thread::available_parallelism().map_or(1, |n| n.get()),
        isa: isa.name,
        bf16: isa.name != "portable" && isa::with_bf16(isa).is_some(),
        amx: isa::with_bf16(isa).is_some_and(Isa::has_matrix_unit),
        // 0 if unknown: then no decoded images are cached.
        memory_mb: system.as_ref().map_or(0, |s| s.total_memory() >> 20),
        free_mb: system.as_ref().map_or(0, |s| s.available_memory() >> 20),
    }
}

fn cpu() -> OpenedDevice {
    OpenedDevice { device: Device::flex(), info: DeviceInfo { choice: "cpu", name: machine().cpu, kind: Kind::Cpu } }
}

/// Lists all devices that this build supports, the CPU first.
pub fn list() -> Vec<DeviceInfo> {
    #[allow(unused_mut, reason = "mutated with GPU features")]
    let mut all = vec![cpu().info];
    #[cfg(feature = "gpu")]
    all.extend(gpu::adapters().into_iter().map(|a| a.info));
    #[cfg(feature = "cuda")]
    all.extend(toolkit("cuda", 0).map(|(_, info)| info));
    #[cfg(feature = "rocm")]
    all.extend(toolkit("rocm", 0).map(|(_, info)| info));
    all
}

/// Opens a device.
///
/// # Errors
/// Any [`Error`]; for `auto` and `cpu` only [`Error::InstructionSet`].
pub fn open(choice: DeviceChoice) -> Result<OpenedDevice, Error> {
    open_nth(choice, 0)
}

/// Opens the `nth` matching device, from 0, modulo their number: one for each process of a machine.
///
/// # Errors
/// Those of [`open`].
pub fn open_nth(choice: DeviceChoice, nth: usize) -> Result<OpenedDevice, Error> {
    isa::choose()?;
    match choice {
        DeviceChoice::Cpu => Ok(cpu()),
        DeviceChoice::Auto => Ok(auto(nth)),
        DeviceChoice::Vulkan => graphics(Some("vulkan"), nth),
        DeviceChoice::Metal => graphics(Some("metal"), nth),
        DeviceChoice::Wgpu => graphics(None, nth),
        #[cfg(feature = "cuda")]
        DeviceChoice::Cuda => toolkit("cuda", nth)
            .map(|(i, info)| OpenedDevice { device: Device::cuda(i), info })
            .ok_or(Error::NotFound { what: "CUDA" }),
        #[cfg(feature = "rocm")]
        DeviceChoice::Rocm => toolkit("rocm", nth)
            .map(|(i, info)| OpenedDevice { device: Device::rocm(i), info })
            .ok_or(Error::NotFound { what: "ROCm" }),
        #[cfg(not(feature = "cuda"))]
        DeviceChoice::Cuda => Err(Error::NotBuilt { what: "CUDA", feature: "cuda" }),
        #[cfg(not(feature = "rocm"))]
        DeviceChoice::Rocm => Err(Error::NotBuilt { what: "ROCm", feature: "rocm" }),
    }
}

/// Checks that a device supports training in a compute precision.
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
    let unsupported = |detail: String| {
        let f16 = precision == Precision::Bf16 && has(Precision::F16);
        let supported = if f16 { "f16" } else { "f32" };
        Err(Error::Precision { device: device_name(device), precision: precision.name(), detail, supported })
    };
    if !has(precision) {
        return unsupported(String::new());
    }
    match convolution_error(device, precision) {
        Ok(error) if error <= MAX_CONVOLUTION_ERROR => Ok(()),
        Ok(error) => unsupported(format!(" correctly: a convolution is off by {:.0} %", 100.0 * error)),
        Err(panic) => unsupported(format!(": a convolution fails ({panic})")),
    }
}

#[cfg(any(feature = "gpu", feature = "cuda", feature = "rocm"))]
fn device_name(device: &Device) -> String {
    device.identity().map_or_else(|| format!("{device:?}"), |identity| identity.name)
}

#[cfg(not(any(feature = "gpu", feature = "cuda", feature = "rocm")))]
fn device_name(device: &Device) -> String {
    format!("{device:?}")
}

/// Maximum error of a 16-bit convolution relative to its largest value: about sixteen roundings of
/// bf16.
const MAX_CONVOLUTION_ERROR: f64 = 0.06;

/// Computes the error of a small convolution and its gradient in this precision, relative to the
/// largest value in f32. Drivers do not report their capabilities reliably, so the results are
/// compared.
///
/// # Errors
/// The panic message of the driver.
fn convolution_error(device: &Device, precision: Precision) -> Result<f64, String> {
    let wave = |n: usize, shape: [usize; 4]| {
        let values: Vec<f32> = (0..n).map(|i| (0.7 * i as f32).sin()).collect();
        Tensor::<4>::from_data(TensorData::new(values, shape), device)
    };
    let compute = |dtype: FloatDType| {
        let x = wave(2 * 8 * 64, [2, 8, 8, 8]).cast(dtype);
        let w = wave(8 * 8 * 9, [8, 8, 3, 3]).autodiff().require_grad();
        let y = conv2d(x.autodiff(), w.clone().cast(dtype), None, ConvOptions::new([1, 1], [1, 1], [1, 1], 1));
        let y = y.cast(FloatDType::F32);
        let dw = w.grad(&y.clone().square().mean().backward());
        let dw = dw.map_or_else(|| w.clone().without_autodiff().zeros_like(), |g| g.cast(FloatDType::F32));
        [y.without_autodiff(), dw].map(|t| t.into_data_as::<f32>().try_into_vec::<f32>().unwrap_or_default())
    };
    let relative_error = |(a, b): (&Vec<f32>, &Vec<f32>)| {
        let largest = a.iter().fold(0.0f32, |m, v| m.max(v.abs()));
        let differences = a.iter().zip(b).map(|(a, b)| (a - b).abs());
        // Propagates NaN, unlike `f32::max`.
        let error = differences.fold(0.0f32, |m, d| if m.is_nan() || d <= m { m } else { d });
        if b.len() == a.len() && error.is_finite() { f64::from(error / largest) } else { 1.0 }
    };
    catch_panic(|| {
        let (expected, actual) = (compute(FloatDType::F32), compute(precision.dtype()));
        expected.iter().zip(&actual).map(relative_error).fold(0.0, f64::max)
    })
}

/// Returns `true` if the device multiplies bf16 in hardware: on processors with AMX or AVX512-BF16,
/// and on GPUs with bf16 matrix units that compute correctly.
pub fn has_bf16_units(opened: &OpenedDevice) -> bool {
    match opened.info.kind {
        Kind::Cpu => machine().bf16,
        Kind::Software => false,
        Kind::Gpu => {
            let usage = Dispatch::dtype_usage(opened.device.as_dispatch(), DType::BF16);
            usage.contains(DTypeUsage::Accelerated) && check(&opened.device, Precision::Bf16).is_ok()
        }
    }
}

/// Returns the CPU kernels for a compute precision.
///
/// # Errors
/// [`Error::InstructionSet`], [`Error::Precision`].
pub fn kernels(precision: Precision) -> Result<&'static Isa, Error> {
    let isa = isa::choose()?;
    let unsupported = |detail: &str, supported| {
        let (device, precision) = (machine().cpu, precision.name());
        Error::Precision { device, precision, detail: detail.into(), supported }
    };
    match precision {
        Precision::F32 => Ok(isa),
        Precision::Bf16 => isa::with_bf16(isa).ok_or_else(|| match isa.name == isa::available()[0].name {
            true => unsupported(" (it has neither AMX nor AVX512-BF16)", "f32"),
            false => unsupported(&format!(" with `BYOL_ISA={}`", isa.name), "f32"),
        }),
        Precision::F16 if isa::with_bf16(isa).is_some() => Err(unsupported("", "bf16")),
        Precision::F16 => Err(unsupported("", "f32")),
    }
}

/// Opens the `nth` hardware GPU, vendor toolkits before graphics APIs, or the next one that starts;
/// otherwise the CPU.
#[cfg_attr(not(any(feature = "gpu", feature = "cuda", feature = "rocm")), allow(unused_variables))]
fn auto(nth: usize) -> OpenedDevice {
    #[cfg(feature = "cuda")]
    if let Ok(opened) = open_nth(DeviceChoice::Cuda, nth) {
        return opened;
    }
    #[cfg(feature = "rocm")]
    if let Ok(opened) = open_nth(DeviceChoice::Rocm, nth) {
        return opened;
    }
    #[cfg(feature = "gpu")]
    {
        let adapters = gpu::adapters();
        let kinds: Vec<Kind> = adapters.iter().map(|adapter| adapter.info.kind).collect();
        if let Some(opened) = auto_order(&kinds, nth).into_iter().find_map(|i| adapters[i].open().ok()) {
            return opened;
        }
    }
    cpu()
}

/// Positions of the adapters that `auto` tries, in order, for process `nth` of this machine:
/// hardware only, each process starting with another one.
#[cfg(any(test, feature = "gpu"))]
fn auto_order(kinds: &[Kind], nth: usize) -> Vec<usize> {
    let mut hardware: Vec<usize> = (0..kinds.len()).filter(|i| kinds[*i] == Kind::Gpu).collect();
    let n = hardware.len().max(1);
    hardware.rotate_left(nth % n);
    hardware
}

#[cfg(feature = "gpu")]
fn graphics(api: Option<&'static str>, nth: usize) -> Result<OpenedDevice, Error> {
    let adapters = gpu::adapters();
    let matches = |a: &&gpu::Adapter| api.is_none_or(|api| a.info.choice == api);
    // Hardware before software drivers.
    let hardware: Vec<_> = adapters.iter().filter(matches).filter(|a| a.info.kind == Kind::Gpu).collect();
    match hardware.get(nth % hardware.len().max(1)).copied().or_else(|| adapters.iter().find(matches)) {
        Some(adapter) => adapter.open(),
        None => Err(Error::NotFound { what: api.unwrap_or("graphics") }),
    }
}

#[cfg(not(feature = "gpu"))]
fn graphics(_api: Option<&'static str>, _nth: usize) -> Result<OpenedDevice, Error> {
    Err(Error::NotBuilt { what: "GPU support", feature: "gpu" })
}

/// Returns the `nth` device of a vendor toolkit, with its index.
#[cfg(any(feature = "cuda", feature = "rocm"))]
fn toolkit(choice: &'static str, nth: usize) -> Option<(usize, DeviceInfo)> {
    use burn::tensor::DeviceType;
    let kind = match choice {
        #[cfg(feature = "cuda")]
        "cuda" => DeviceType::Cuda,
        #[cfg(feature = "rocm")]
        "rocm" => DeviceType::Rocm,
        _ => return None,
    };
    let devices = Device::enumerate(kind);
    let n = devices.iter().count();
    let index = nth.checked_rem(n)?;
    let device = devices.iter().nth(index)?;
    let name = device.identity().map_or_else(|| choice.to_owned(), |identity| identity.name);
    Some((index, DeviceInfo { choice, name, kind: Kind::Gpu }))
}

#[cfg(feature = "gpu")]
mod gpu {
    use burn::tensor::{
        Device, DeviceKind,
        wgpu::{WgpuBackend, wgpu},
    };

    use super::{DeviceInfo, Error, Kind, OpenedDevice};

    /// An adapter listed by wgpu.
    pub struct Adapter {
        pub info: DeviceInfo,
        kind: DeviceKind,
        api: WgpuBackend,
    }

    /// Lists the adapters of all compute-capable APIs, numbered per kind, as in Burn.
    pub(crate) fn adapters() -> Vec<Adapter> {
        let apis = [
            ("metal", wgpu::Backends::METAL, WgpuBackend::Metal),
            ("vulkan", wgpu::Backends::VULKAN, WgpuBackend::Vulkan),
            ("wgpu", wgpu::Backends::DX12, WgpuBackend::Dx12),
        ];
        // Not OpenGL, whose drivers make the symbols of their LLVM global: in Python, an import of
        // PyTorch's Triton, which has an LLVM of its own, would then crash.
        let backends = apis.iter().fold(wgpu::Backends::empty(), |all, (_, backends, _)| all | *backends);
        let without_display = wgpu::InstanceDescriptor::new_without_display_handle();
        let instance = wgpu::Instance::new(wgpu::InstanceDescriptor { backends, ..without_display });
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
                    wgpu::DeviceType::Other => continue, // unknown compute capability
                };
                all.push(Adapter { info: DeviceInfo { choice, name: info.name, kind: hardware }, kind, api });
            }
        }
        all
    }

    impl Adapter {
        pub fn open(&self) -> Result<OpenedDevice, Error> {
            use std::{collections::HashMap, sync::Mutex};
            // Runtimes start once per process.
            static STARTED: Mutex<Option<HashMap<String, Device>>> = Mutex::new(None);
            let mut started = STARTED.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
            let started = started.get_or_insert_default();
            let key = format!("{:?} {:?}", self.kind, self.api);
            if !started.contains_key(&key) {
                let options = Device::wgpu_options().device_kind(self.kind.clone()).graphics_api(self.api);
                let device = options
                    .init()
                    .map_err(|e| Error::DoesNotStart { name: self.info.name.clone(), reason: e.to_string() })?;
                started.insert(key.clone(), device);
            }
            Ok(OpenedDevice { device: started[&key].clone(), info: self.info.clone() })
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[cfg(all(feature = "gpu", target_os = "linux"))]
    #[test]
    fn opengl_is_not_loaded() {
        gpu::adapters();
        assert!(!std::fs::read_to_string("/proc/self/maps").unwrap().contains("libEGL"));
    }

    #[test]
    fn auto_never_selects_a_software_driver() {
        let kinds = [Kind::Software, Kind::Gpu, Kind::Cpu, Kind::Gpu, Kind::Software];
        assert_eq!(auto_order(&kinds, 0), [1, 3]);
        assert_eq!(auto_order(&kinds, 1), [3, 1], "the next process starts with the next GPU");
        assert!(auto_order(&[Kind::Software, Kind::Cpu], 0).is_empty());
        assert_ne!(open(DeviceChoice::Auto).unwrap().info.kind, Kind::Software);
    }

    #[test]
    fn all_listed_names_parse() {
        for name in DeviceChoice::NAMES {
            assert!(name.parse::<DeviceChoice>().is_ok(), "{name}");
        }
        assert!("gpu".parse::<DeviceChoice>().is_err());
    }

    #[cfg(not(feature = "gpu"))]
    #[test]
    fn error_names_the_missing_feature() {
        assert!(open(DeviceChoice::Vulkan).unwrap_err().to_string().contains("--features gpu"));
    }
}
