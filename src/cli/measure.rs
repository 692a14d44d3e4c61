//! What a benchmark says of the machine and of the process.

use std::time::{Duration, Instant};

use serde::Serialize;
use sidereal::backend::{Backend, Epilogue};
use sidereal::device::WithBackend;
use sidereal::{Error, Recommender, Result, Tensor};

use super::device::DeviceArguments;

/// The machine that figures belong to.
#[derive(Serialize)]
pub struct Machine {
    pub cpu: String,
    pub cores: usize,
    pub matrix_kernel: String,
    /// Measured now, with the engine's number type: 512 x 1024 x 3072 on the benchmark's threads,
    /// 8192 x 8192 x 8192 on a device.
    pub matrix_gflops: f64,
}

impl Machine {
    /// Measures a device on as many threads as a recommender had there, which gives its memory back
    /// first.
    ///
    /// # Errors
    /// The backend's.
    pub fn measure_alone(device: &DeviceArguments, recommender: Recommender) -> Result<Machine> {
        let num_threads = recommender.num_threads();
        drop(recommender);
        device.with_backend(Measure { num_threads })
    }
}

struct Measure {
    num_threads: usize,
}

impl WithBackend for Measure {
    type Output = Machine;

    fn run<B: Backend>(self, backend: B) -> Result<Machine> {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(self.num_threads).build();
        let pool = pool
            .map_err(|error| Error::Device { device: "cpu".into(), reason: error.to_string() })?;
        Ok(Machine {
            cpu: cpu_name().unwrap_or_else(|| std::env::consts::ARCH.into()),
            cores: std::thread::available_parallelism().map_or(1, usize::from),
            matrix_kernel: backend.description(),
            matrix_gflops: pool.install(|| matrix_gflops(&backend))?,
        })
    }
}

fn cpu_name() -> Option<String> {
    let text = std::fs::read_to_string("/proc/cpuinfo").ok()?;
    let line = text.lines().find(|line| line.starts_with("model name"))?;
    Some(line.split_once(':')?.1.trim().to_string())
}

/// The best of several products: what the machine can do at most.
pub fn matrix_gflops<B: Backend>(backend: &B) -> Result<f64> {
    let (rows, columns, out) =
        if B::COMPUTES_ON_CALLERS { (512, 1024, 3072) } else { (8192, 8192, 8192) };
    let pseudo_random = |len: usize| (0..len).map(|i| ((i * 7919) % 1013) as f32 / 1013.0 - 0.5);
    let weight = Tensor::new(&[out, columns], pseudo_random(out * columns).collect());
    let weight = backend.matrix(&[weight])?;
    let x = backend.upload(&pseudo_random(rows * columns).collect::<Vec<f32>>(), columns);
    let last = backend.upload(&[0.0], 1);
    let mut product = backend.buffer();
    let mut best = f64::INFINITY;
    for _ in 0..12 {
        let start = Instant::now();
        backend.matmul(&x, &weight, None, Epilogue::Store, &mut product);
        backend.download(&last)?; // waits for the device
        best = best.min(start.elapsed().as_secs_f64());
    }
    Ok(2.0 * (rows * columns * out) as f64 / best / 1e9)
}

/// CPU time of all threads of this process so far, where the system tells.
pub fn cpu_time() -> Option<Duration> {
    #[cfg(unix)]
    {
        let time = rustix::time::clock_gettime(rustix::time::ClockId::ProcessCPUTime);
        Some(Duration::new(time.tv_sec as u64, time.tv_nsec as u32))
    }
    #[cfg(not(unix))]
    None
}

/// The most memory that this process held, where the system tells.
pub fn peak_memory_bytes() -> Option<u64> {
    let text = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = text.lines().find(|line| line.starts_with("VmHWM:"))?;
    let kilobytes: u64 = line.split_whitespace().nth(1)?.parse().ok()?;
    Some(kilobytes * 1024)
}
