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
    /// The same by CPU time instead of time, of one core: what others do on the machine does not
    /// count. `None` on a device, and where the system tells no CPU time.
    pub matrix_gflops_per_cpu: Option<f64>,
}

/// Products measured one after the other.
struct Rates {
    gflops: f64,
    gflops_per_cpu: Option<f64>,
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
        let rates = pool.install(|| matrix_rates(&backend))?;
        Ok(Machine {
            cpu: cpu_name().unwrap_or_else(|| std::env::consts::ARCH.into()),
            cores: std::thread::available_parallelism().map_or(1, usize::from),
            matrix_kernel: backend.description(),
            matrix_gflops: rates.gflops,
            matrix_gflops_per_cpu: rates.gflops_per_cpu,
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
    Ok(matrix_rates(backend)?.gflops)
}

fn matrix_rates<B: Backend>(backend: &B) -> Result<Rates> {
    let (rows, columns, out) =
        if B::COMPUTES_ON_CALLERS { (512, 1024, 3072) } else { (8192, 8192, 8192) };
    let pseudo_random = |len: usize| (0..len).map(|i| ((i * 7919) % 1013) as f32 / 1013.0 - 0.5);
    let weight = Tensor::new(&[out, columns], pseudo_random(out * columns).collect());
    let weight = backend.matrix(&[weight])?;
    let x = backend.upload(&pseudo_random(rows * columns).collect::<Vec<f32>>(), columns);
    let last = backend.upload(&[0.0], 1);
    let mut product = backend.buffer();
    let (mut best, mut best_cpu) = (f64::INFINITY, None);
    for _ in 0..12 {
        let (start, cpu_start) = (Instant::now(), cpu_time());
        backend.matmul(&x, &weight, None, Epilogue::Store, &mut product);
        backend.download(&last)?; // waits for the device
        best = best.min(start.elapsed().as_secs_f64());
        let cpu = cpu_time().zip(cpu_start).map(|(end, start)| (end - start).as_secs_f64());
        best_cpu = cpu.map(|cpu| best_cpu.map_or(cpu, |best: f64| best.min(cpu)));
    }
    let gflop = 2.0 * (rows * columns * out) as f64 / 1e9;
    let on_callers = best_cpu.filter(|&cpu| B::COMPUTES_ON_CALLERS && cpu > 0.0);
    Ok(Rates { gflops: gflop / best, gflops_per_cpu: on_callers.map(|cpu| gflop / cpu) })
}

/// Time that all cores together were busy and that there was, in ticks of the system since it began.
#[derive(Clone, Copy)]
pub struct Ticks {
    busy: u64,
    all: u64,
}

impl Ticks {
    /// Now, where the system tells.
    pub fn now() -> Option<Ticks> {
        let text = std::fs::read_to_string("/proc/stat").ok()?;
        Ticks::parse(text.lines().next()?)
    }

    /// The line `cpu  user nice system idle iowait irq softirq steal ...`.
    fn parse(line: &str) -> Option<Ticks> {
        let fields = line.strip_prefix("cpu ")?.split_whitespace().take(8);
        let ticks: Vec<u64> = fields.map(str::parse).collect::<std::result::Result<_, _>>().ok()?;
        let all = ticks.iter().sum();
        let idle: u64 = ticks.get(3..5)?.iter().sum();
        Some(Ticks { busy: all - idle, all })
    }

    /// The share of the machine that other processes took since `self`, of which `own` was ours.
    pub fn others_share(self, now: Ticks, own: Duration, elapsed: Duration) -> Option<f64> {
        let all = now.all.checked_sub(self.all).filter(|&all| all > 0)? as f64;
        let busy = now.busy.saturating_sub(self.busy) as f64 / all;
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        let own = own.as_secs_f64() / (elapsed.as_secs_f64() * cores as f64);
        Some((busy - own).clamp(0.0, 1.0))
    }
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_others_take_is_what_is_busy_and_not_ours() {
        let ticks = |line| Ticks::parse(line).expect("a line of /proc/stat");
        let before = ticks("cpu  100 0 0 100 0 0 0 0 0 0");
        let after = ticks("cpu  150 10 10 130 0 0 0 0 0 0");
        let cores = std::thread::available_parallelism().map_or(1, usize::from) as u32;
        let second = Duration::from_secs(1);
        let others = |own| before.others_share(after, own, second).expect("time went by");
        assert!((others(Duration::ZERO) - 0.7).abs() < 1e-9);
        assert!((others(second * cores / 2) - 0.2).abs() < 1e-9);
        assert_eq!(others(second * cores), 0.0);
        assert!(before.others_share(before, second, second).is_none());
        assert!(Ticks::parse("cpu0 1 2 3 4 5").is_none());
    }
}
