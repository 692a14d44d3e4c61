//! Where commands compute.

use std::str::FromStr;

use clap::ValueEnum;

/// A device by its name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Device {
    Cpu,
    Cuda(usize),
}

impl FromStr for Device {
    type Err = String;

    fn from_str(name: &str) -> Result<Device, String> {
        let unknown =
            || format!("no device is named {name:?}; \"cpu\", \"cuda\" and \"cuda:0\" are");
        match name.split_once(':') {
            None if name == "cpu" => Ok(Device::Cpu),
            None if name == "cuda" => Ok(Device::Cuda(0)),
            Some(("cuda", number)) => number.parse().map(Device::Cuda).map_err(|_| unknown()),
            _ => Err(unknown()),
        }
    }
}

/// Number types of activations.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum DtypeName {
    /// Single precision
    F32,
    /// The upper half of it: half the memory, and tensor cores
    Bf16,
}

/// Does something with the backend of a device, whatever its type is.
macro_rules! on_device {
    ($arguments:expr, |$backend:ident| $work:expr) => {{
        let arguments: &$crate::cli::DeviceArguments = $arguments;
        match arguments.device {
            $crate::cli::device::Device::Cpu => {
                arguments.check_cpu()?;
                let $backend = ::sidereal::backend::cpu::CpuBackend::default();
                $work
            }
            #[cfg(feature = "cuda")]
            $crate::cli::device::Device::Cuda(ordinal) => {
                let device = ::sidereal::backend::cuda::CudaDevice::open(ordinal)?;
                let $backend =
                    ::sidereal::backend::cuda::CudaBackend::new(device, arguments.cuda_dtype());
                $work
            }
            #[cfg(not(feature = "cuda"))]
            $crate::cli::device::Device::Cuda(ordinal) => Err(::sidereal::Error::Device {
                device: format!("cuda:{ordinal}"),
                reason: "this build computes on \"cpu\"; build it with --features cuda".into(),
            }),
        }
    }};
}
