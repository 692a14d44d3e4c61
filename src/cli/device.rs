//! Where commands compute.

use clap::{Args, ValueEnum};
use sidereal::device::WithBackend;
use sidereal::{Device, Dtype, EngineOptions, RecommenderOptions, Result};

/// A device by its name, for the parser of arguments.
pub fn parse(name: &str) -> std::result::Result<Device, String> {
    let unknown = |_| format!("no device is named {name:?}; \"cpu\", \"cuda\" and \"cuda:0\" are");
    name.parse().map_err(unknown)
}

/// Number types of products with weights.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum DtypeName {
    /// Single precision
    F32,
    /// The upper half of it: half the memory, and tensor cores or tiles
    Bf16,
    /// Whole numbers of 8 bits with a scale for each row and output, the output head in bf16: on CPUs
    Int8,
}

#[derive(Args, Clone)]
pub struct DeviceArguments {
    /// Device to compute on: cpu, cuda or cuda:N
    #[arg(long, default_value = "cpu", value_parser = parse)]
    pub device: Device,
    /// Number type of products with weights; by default bf16 on GPUs, and on CPUs that have instructions
    /// for it where the checkpoint is stored so, else f32
    #[arg(long)]
    pub dtype: Option<DtypeName>,
    /// Threads to compute on; 0 for all cores
    #[arg(long, default_value_t = 0, value_name = "N", value_parser = clap::value_parser!(u16).range(..=1024))]
    pub threads: u16,
    /// The most input tokens of a request
    #[arg(long, default_value_t = EngineOptions::default().max_context as u64, value_name = "TOKENS", value_parser = clap::value_parser!(u64).range(1..))]
    pub max_context: u64,
    /// Tokens of all contexts together, of requests that run and of users who may return; by default what
    /// 256 MiB hold, or half of a GPU's free memory
    #[arg(long, default_value_t = 0, hide_default_value = true, value_name = "TOKENS")]
    pub context_tokens: usize,
}

impl DeviceArguments {
    /// The number type that was asked for.
    fn dtype(&self) -> Option<Dtype> {
        self.dtype.map(|dtype| match dtype {
            DtypeName::F32 => Dtype::F32,
            DtypeName::Bf16 => Dtype::Bf16,
            DtypeName::Int8 => Dtype::Int8,
        })
    }

    /// How an engine is opened.
    pub fn engine_options(&self) -> EngineOptions {
        EngineOptions::for_device(self.device)
            .with_threads(self.threads.into())
            .with_max_context(usize::try_from(self.max_context).unwrap_or(usize::MAX))
            .with_context_tokens(self.context_tokens)
    }

    /// How a recommender is opened.
    pub fn options(&self) -> RecommenderOptions {
        let mut options = RecommenderOptions::new(self.device.to_string());
        options.engine = self.engine_options();
        options.dtype = self.dtype();
        options
    }

    /// Does something with the device's backend, whatever its type is.
    pub fn with_backend<W: WithBackend>(&self, work: W) -> Result<W::Output> {
        self.device.with_backend(self.dtype(), work)
    }
}
