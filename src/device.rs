//! Devices by name, so that callers need neither a type nor a `cfg` for each.

use std::fmt;
use std::str::FromStr;

use crate::backend::Backend;
use crate::backend::cpu::{CpuBackend, Instructions};
use crate::error::{Error, Result};
use crate::tensor::Dtype;

/// Where a model computes. Its name is `cpu`, `cuda` (the first GPU) or `cuda:1`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
#[non_exhaustive]
pub enum Device {
    /// The cores of this machine.
    #[default]
    Cpu,
    /// An NVIDIA GPU, by its number.
    Cuda(usize),
}

impl FromStr for Device {
    type Err = Error;

    /// # Errors
    /// [`Error::Device`] where no device has such a name.
    fn from_str(name: &str) -> Result<Device> {
        let unknown = || Error::Device {
            device: name.into(),
            reason: "no device has this name; \"cpu\", \"cuda\" and \"cuda:0\" are names".into(),
        };
        match name.split_once(':') {
            None if name == "cpu" => Ok(Device::Cpu),
            None if name == "cuda" => Ok(Device::Cuda(0)),
            Some(("cuda", number)) => number.parse().map(Device::Cuda).map_err(|_| unknown()),
            _ => Err(unknown()),
        }
    }
}

impl fmt::Display for Device {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Device::Cpu => formatter.write_str("cpu"),
            Device::Cuda(number) => write!(formatter, "cuda:{number}"),
        }
    }
}

/// Work to be done on a backend, whatever its type is.
pub trait WithBackend {
    /// What comes of it.
    type Output;

    /// Does the work.
    ///
    /// # Errors
    /// The work's own.
    fn run<B: Backend>(self, backend: B) -> Result<Self::Output>;
}

impl Device {
    /// The number type that suits weights stored in `stored` where nobody asks for another: bf16 for
    /// products on a GPU, and on a CPU with instructions for them where the weights are stored so;
    /// else f32.
    pub fn default_dtype(self, stored: Dtype) -> Dtype {
        match self {
            Device::Cuda(_) => Dtype::Bf16,
            Device::Cpu if stored == Dtype::Bf16 => {
                match Instructions::best(Dtype::Bf16).are_fast() {
                    true => Dtype::Bf16,
                    false => Dtype::F32,
                }
            }
            Device::Cpu => Dtype::F32,
        }
    }

    /// Opens the device, to compute in `dtype`, or in f32 on the CPU and bf16 on a GPU, and does
    /// `work` there. Every device can be asked for in every build.
    ///
    /// # Errors
    /// [`Error::Device`] where this build or this machine does not have it; [`Error::Unsupported`]
    /// where it does not compute in such numbers; those of the work.
    pub fn with_backend<W: WithBackend>(self, dtype: Option<Dtype>, work: W) -> Result<W::Output> {
        match self {
            Device::Cpu => work.run(CpuBackend::new(dtype.unwrap_or(Dtype::F32))?),
            #[cfg(feature = "cuda")]
            Device::Cuda(number) => {
                let dtype = dtype.unwrap_or(Dtype::Bf16);
                if !matches!(dtype, Dtype::F32 | Dtype::Bf16) {
                    return Err(crate::Error::Unsupported {
                        what: format!("computing in {} on a GPU", dtype.name()),
                        way_out: "bf16 and f32 are there".into(),
                    });
                }
                let device = crate::backend::cuda::CudaDevice::open(number)?;
                work.run(crate::backend::cuda::CudaBackend::new(device, dtype))
            }
            #[cfg(not(feature = "cuda"))]
            Device::Cuda(_) => Err(Error::Device {
                device: self.to_string(),
                reason: "this build computes on \"cpu\"; build it with --features cuda".into(),
            }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_device_is_known_by_its_name() {
        for (name, device) in
            [("cpu", Device::Cpu), ("cuda", Device::Cuda(0)), ("cuda:3", Device::Cuda(3))]
        {
            assert_eq!(name.parse::<Device>().expect("a name"), device);
            assert_eq!(device.to_string().parse::<Device>().expect("a name"), device);
        }
        for name in ["", "abacus", "cuda:", "cuda:x", "cpu:0"] {
            let error = name.parse::<Device>().expect_err("no name");
            assert!(error.to_string().contains("\"cuda:0\""), "{error}");
        }
    }
}
