//! `sidereal selftest`: is a device right, and is it fast?

use std::io::Write;
use std::path::{Path, PathBuf};
use std::slice;
use std::sync::Arc;
use std::time::Instant;

use clap::Args;
use sidereal::backend::cpu::CpuBackend;
use sidereal::backend::testing::{self, Cases, Fixture, OPERATIONS};
use sidereal::backend::{AttentionSpec, Backend, Batch, Heads, KvScope, Mask, SearchRule};
use sidereal::catalog::allowed::AllowedSet;
use sidereal::catalog::sid::Sid;
use sidereal::catalog::{CatalogBuilder, Item, Snapshot};
use sidereal::device::WithBackend;
use sidereal::{Dtype, Engine, Recommendation, Request, Result, Tensor};

use super::arguments::{MAP_CATALOG_ABOVE_MIB, ModelArguments, Outcome, write_error};
use super::device::DeviceArguments;
use super::measure::matrix_gflops;

/// The demo model, so that the binary alone is enough.
const DEMO: [(&str, &[u8]); 4] = [
    ("config.json", include_bytes!("../../models/industrial/config.json")),
    ("sidereal.json", include_bytes!("../../models/industrial/sidereal.json")),
    ("items.jsonl", include_bytes!("../../models/industrial/items.jsonl")),
    ("model.safetensors", include_bytes!("../../models/industrial/model.safetensors")),
];

#[derive(Args)]
#[command(after_help = "\
Every operation is run on cases drawn at random and compared with the CPU; then
the demo model, which the binary holds, is asked the same on both; then the
operations are measured at the shapes of Qwen3-1.7B, beside the rates of copies
and of large matrix products that the device itself reaches. The exit code is 0
if all agrees, 1 if something differs, 2 if the device cannot be used.

Examples:
  sidereal selftest --device cuda:0
  sidereal selftest --device cuda:0 --dtype f32 --cases 200
  sidereal selftest --device cuda:0 --model models/industrial
  sidereal selftest --dtype bf16 --model models/industrial --no-bench")]
pub struct Arguments {
    #[command(flatten)]
    device: DeviceArguments,
    /// Cases of each operation
    #[arg(long, default_value_t = 40, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    cases: u64,
    /// Model folder to ask; by default the demo model
    #[arg(long, value_name = "DIR")]
    model: Option<PathBuf>,
    /// Folder of an adapter's base, where adapter_config.json does not name it
    #[arg(long, value_name = "DIR", requires = "model")]
    base: Option<PathBuf>,
    /// Its catalog; by default the one beside the model
    #[arg(long, value_name = "FILE", requires = "model")]
    catalog: Option<PathBuf>,
    /// Leave out the measurements
    #[arg(long)]
    no_bench: bool,
}

/// What a backend may differ from the CPU by: norm-wise, in the score and log-probabilities of an
/// answer, and the share of an answer's items that must be the same. Items whose scores are within
/// the bound may change places.
struct Bounds {
    operation: f64,
    score: f32,
    share: f64,
}

pub fn run(arguments: &Arguments) -> Result<Outcome> {
    arguments.device.with_backend(Selftest(arguments))
}

struct Selftest<'a>(&'a Arguments);

impl WithBackend for Selftest<'_> {
    type Output = Outcome;

    fn run<B: Backend>(self, backend: B) -> Result<Outcome> {
        run_on(self.0, backend)
    }
}

/// Where nobody reads, the exit code tells.
fn say(line: &str) -> Result<()> {
    match writeln!(std::io::stdout(), "{line}") {
        Err(error) if error.kind() == std::io::ErrorKind::BrokenPipe => Ok(()),
        written => written.map_err(write_error(None)),
    }
}

fn run_on<B: Backend>(arguments: &Arguments, backend: B) -> Result<Outcome> {
    say(&format!("selftest of {}", backend.description()))?;
    if B::COMPUTES_ON_CALLERS && backend.dtype() == Dtype::F32 {
        say(
            "the CPU is compared with itself; name a GPU with --device cuda:0, or --dtype bf16 or int8",
        )?;
    }
    let bounds = match backend.dtype() {
        Dtype::F32 => Bounds { operation: 1e-5, score: 1e-3, share: 0.99 },
        Dtype::Int8 => Bounds { operation: 3e-2, score: 0.3, share: 0.8 },
        _ => Bounds { operation: 2e-2, score: 0.1, share: 0.9 },
    };
    let mut cpu = open_model(arguments, CpuBackend::default())?;
    let mut is_right = check_operations(&backend, arguments.cases, &bounds)?;
    // The model takes the backend for itself; what is measured comes last.
    let mut engine = open_model(arguments, backend)?;
    is_right &= check_model(&mut cpu, &mut engine, &bounds)?;
    if !arguments.no_bench {
        engine.run(measure_operations)?;
    }
    say(if is_right { "all agrees" } else { "SOMETHING DIFFERS" })?;
    Ok(if is_right { Outcome::Done } else { Outcome::SomeFailed })
}

/// Whether every operation's cases agree with the CPU's.
fn check_operations<B: Backend>(backend: &B, cases: u64, bounds: &Bounds) -> Result<bool> {
    let cpu = CpuBackend::default();
    let mut is_right = true;
    for operation in OPERATIONS {
        let (mut worst, mut worst_seed) = (0.0, 0);
        for seed in 0..cases {
            let expected = testing::run(&cpu, operation, seed)?;
            let found = testing::run(backend, operation, seed)?;
            let error = relative_error(&found, &expected);
            if error.is_nan() || error > worst {
                (worst, worst_seed) = (error, seed);
                if error.is_nan() {
                    break;
                }
            }
        }
        let agrees = worst < bounds.operation;
        is_right &= agrees;
        let mark = if agrees { "ok" } else { "DIFFERS" };
        say(&format!(
            "{operation:<16} {mark:<8} {cases} cases, at most {worst:.1e} (case {worst_seed}; bound {:.0e})",
            bounds.operation
        ))?;
    }
    Ok(is_right)
}

/// Norm-wise; NaN where something is not finite or of another length.
fn relative_error(found: &[f32], expected: &[f32]) -> f64 {
    if found.len() != expected.len() {
        return f64::NAN;
    }
    let square = |x: f64| x * x;
    let pairs = found.iter().zip(expected).map(|(&a, &b)| (f64::from(a), f64::from(b)));
    let difference: f64 = pairs.clone().map(|(found, expected)| square(found - expected)).sum();
    let norm: f64 = pairs.map(|(_, expected)| square(expected)).sum();
    (difference / norm.max(1e-30)).sqrt()
}

/// The demo model, or the one that was named, on a device.
fn open_model<B: Backend>(arguments: &Arguments, backend: B) -> Result<Engine<B>> {
    let options = arguments.device.engine_options();
    let open = |folder: &Path| {
        let model = ModelArguments {
            base: arguments.base.clone(),
            model: folder.to_path_buf(),
            catalog: arguments.catalog.clone(),
            map_catalog_above: MAP_CATALOG_ABOVE_MIB,
            device: arguments.device.clone(),
        };
        let spinner = super::requests::spinner("opening the model");
        let engine = {
            let catalog = model.open_catalog()?;
            Engine::open_on(backend, folder, model.base.as_deref(), catalog, &options)?
        };
        spinner.finish_and_clear();
        Ok(engine)
    };
    if let Some(folder) = &arguments.model {
        return open(folder);
    }
    let folder = tempfile::tempdir().map_err(write_error(Some(&std::env::temp_dir())))?;
    for (name, bytes) in DEMO {
        let path = folder.path().join(name);
        std::fs::write(&path, bytes).map_err(write_error(Some(&path)))?;
    }
    open(folder.path())
}

/// Whether a model answers as on the CPU.
fn check_model<B: Backend>(
    cpu: &mut Engine,
    device: &mut Engine<B>,
    bounds: &Bounds,
) -> Result<bool> {
    let snapshot = cpu.catalog().snapshot();
    let items: Vec<u32> = snapshot.all_items().collect();
    let mut rng = fastrand::Rng::with_seed(3);
    let (mut answers, mut common, mut all, mut worst) = (0, 0, 0, 0f32);
    let mut is_whole = true;
    let mut note = |a: f32, b: f32| {
        let difference = (a - b).abs();
        worst = if difference.is_nan() { f32::INFINITY } else { worst.max(difference) };
    };
    // More than twice: a shape of steps that was seen is recorded, and then replayed.
    for len in [1, 5, 20, 60].repeat(4) {
        let mut item = |_| snapshot.name(items[rng.usize(0..items.len())]).to_string();
        let history: Vec<String> = (0..len).map(&mut item).collect();
        let mut request = Request::from_history(history);
        (request.beams, request.top_k) = (50, 10);
        request.log_probs = answers % 2 == 1;
        request.exclude = (0..answers * 10).map(&mut item).collect();
        let (expected, found) = (cpu.recommend(&request)?, device.recommend(&request)?);
        is_whole &= expected.items.len() == found.items.len();
        for (expected, found) in expected.items.iter().zip(&found.items) {
            note(expected.score, found.score);
        }
        for expected in &expected.items {
            let is_same = |found: &&Recommendation| found.item == expected.item;
            let Some(found) = found.items.iter().find(is_same) else { continue };
            common += 1;
            note(expected.score, found.score);
            is_whole &= expected.log_probs.len() == found.log_probs.len();
            for (a, b) in expected.log_probs.iter().zip(&found.log_probs) {
                note(a.vocabulary, b.vocabulary);
                note(a.children, b.children);
            }
        }
        all += expected.items.len();
        answers += 1;
    }
    let agrees = is_whole && worst < bounds.score && f64::from(common) >= bounds.share * all as f64;
    let mark = if agrees { "ok" } else { "DIFFERS" };
    say(&format!(
        "model            {mark:<8} {answers} answers, {common} of {all} items the same (bound {:.0} %), scores \
         and log-probabilities within {worst:.1e} (bound {:.0e})",
        100.0 * bounds.share,
        bounds.score
    ))?;
    Ok(agrees)
}

/// Seconds of `work`, which is asked for so often that starting it does not count.
fn seconds<B: Backend>(backend: &B, mut work: impl FnMut()) -> Result<f64> {
    let last = backend.upload(&[0.0], 1);
    let repeat = if B::COMPUTES_ON_CALLERS { 3 } else { 50 };
    let mut best = f64::INFINITY;
    for _ in 0..3 {
        work();
        backend.download(&last)?;
        let start = Instant::now();
        (0..repeat).for_each(|_| work());
        backend.download(&last)?;
        best = best.min(start.elapsed().as_secs_f64() / f64::from(repeat));
    }
    Ok(best)
}

/// The heads of Qwen3-1.7B.
const HEADS: Heads = Heads::new(16, 8, 128);

fn measure_operations<B: Backend>(backend: &B) -> Result<()> {
    let mut cases = Cases::new(1);
    let rates = Rates::measure(backend, &mut cases)?;
    let most = if B::COMPUTES_ON_CALLERS { 500 } else { 4000 };
    for tokens in [1000, most] {
        measure_prefill(backend, &mut cases, &rates, tokens)?;
    }
    let searches = Searches::new(backend, &mut cases)?;
    for (width, context) in [(32, 1000), (256, 1000), (256, most), (512, 1000)] {
        measure_beams(backend, &mut cases, &rates, &searches, [width, context])?;
    }
    Ok(())
}

/// The yardsticks: what the device itself reaches.
struct Rates {
    /// TFLOP/s of a large matrix product.
    peak: f64,
    /// GB/s of copies.
    bandwidth: f64,
    number_bytes: f64,
}

impl Rates {
    fn measure<B: Backend>(backend: &B, cases: &mut Cases) -> Result<Rates> {
        let number_bytes = backend.kv_dtype().size() as f64;
        let peak = matrix_gflops(backend)? / 1e3;
        // Copying: every row of a table once.
        let (rows, columns) = if B::COMPUTES_ON_CALLERS { (2048, 2048) } else { (32_768, 4096) };
        let table =
            backend.table(Tensor::new(&[rows, columns], cases.numbers(rows * columns)), None)?;
        let tokens: Vec<u32> = (0..rows as u32).collect();
        let mut out = backend.buffer();
        let mut fixture = Fixture::new(backend, HEADS)?;
        let (chunk, mut slots) = (0..rows, [fixture.slot(1)]);
        let batch = Batch::new(&fixture.memory, std::slice::from_ref(&chunk), &mut slots);
        let time = seconds(backend, || backend.embed(&table, &tokens, &batch, &mut out))?;
        let bandwidth = 2.0 * (rows * columns) as f64 * number_bytes / time / 1e9;
        say(&format!(
            "matrix products  {peak:.2} TFLOP/s; copies {bandwidth:.0} GB/s ({rows} rows of {columns})"
        ))?;
        Ok(Rates { peak, bandwidth, number_bytes })
    }

    /// Prints a line for an operation that moves so many numbers.
    fn say(&self, what: &str, time: f64, flops: f64, numbers: usize) -> Result<()> {
        let bytes = numbers as f64 * self.number_bytes;
        let (rate, moved) = (flops / time / 1e12, bytes / time / 1e9);
        say(&format!(
            "{what:<34} {:9.1} us {rate:8.2} TFLOP/s ({:3.0} %) {moved:8.1} GB/s ({:3.0} %)",
            time * 1e6,
            100.0 * rate / self.peak,
            100.0 * moved / self.bandwidth
        ))
    }
}

fn measure_prefill<B: Backend>(
    backend: &B,
    cases: &mut Cases,
    rates: &Rates,
    tokens: usize,
) -> Result<()> {
    let mut fixture = Fixture::new(backend, HEADS)?;
    let mut slots = vec![fixture.slot(tokens)];
    let qkv = backend.upload(&cases.numbers(tokens * HEADS.qkv_dim()), HEADS.qkv_dim());
    let (whole, mut out) = (0..tokens, backend.buffer());
    let batch = Batch::new(&fixture.memory, slice::from_ref(&whole), &mut slots);
    backend.store_context(0, &qkv, HEADS.query_dim(), HEADS, &batch);
    let attention = AttentionSpec::softmax(HEADS, Mask::Causal, 0.1);
    let time = seconds(backend, || {
        backend.attend_prefill(0, &qkv, &attention, &batch, &mut out);
    })?;
    let flops = 2.0 * (tokens * tokens * HEADS.query_dim()) as f64;
    let numbers = tokens * (2 * HEADS.query_dim() + 2 * HEADS.kv_dim());
    rates.say(&format!("attend_prefill, {tokens} tokens"), time, flops, numbers)
}

/// A catalog to search, and an output head for it.
struct Searches<B: Backend> {
    snapshot: Arc<Snapshot>,
    allowed_set: AllowedSet,
    head: B::Head,
}

impl<B: Backend> Searches<B> {
    fn new(backend: &B, cases: &mut Cases) -> Result<Searches<B>> {
        const CODES: u32 = 8192;
        let mut builder = CatalogBuilder::default();
        for item in 0..200_000 {
            let codes: Vec<u16> = (0..3).map(|_| cases.rng.u16(0..CODES as u16)).collect();
            builder.add(Item::new(item.to_string(), Sid::new(&codes)?))?;
        }
        let snapshot = builder.build()?.snapshot();
        let levels: Vec<Vec<u32>> =
            (0..3).map(|level| (level * CODES..(level + 1) * CODES).collect()).collect();
        let head = Tensor::new(&[3 * CODES as usize, 64], cases.numbers(3 * CODES as usize * 64));
        Ok(Searches {
            allowed_set: snapshot.allowed_set(&[], None)?,
            head: backend.head(head, &levels, &[])?,
            snapshot,
        })
    }
}

fn measure_beams<B: Backend>(
    backend: &B,
    cases: &mut Cases,
    rates: &Rates,
    searches: &Searches<B>,
    [width, context]: [usize; 2],
) -> Result<()> {
    let (head, mut logits) = (&searches.head, backend.logits());
    let mut fixture = Fixture::new(backend, HEADS)?;
    let spec = fixture.spec(context);
    let kv = cases.numbers(context * 2 * HEADS.kv_dim());
    let kv = backend.upload(&kv, 2 * HEADS.kv_dim());
    let mut slots = vec![backend.open_slot(spec.clone())?];
    let whole = 0..context;
    let batch = Batch::new(&fixture.memory, slice::from_ref(&whole), &mut slots);
    backend.store_context(0, &kv, 0, HEADS, &batch);
    let rule = |level| SearchRule::new(&searches.snapshot, &searches.allowed_set, level, width);
    let rules = [0, 1].map(|level| [rule(level)]);
    let first = backend.upload(&cases.numbers(64), 64);
    let mut pass = Batch::new(&fixture.memory, &[], &mut slots);
    backend.lm_head(&first, head, &rules[0], &mut pass, &mut logits);
    backend.advance_beams(&logits, head, &rules[0], &mut pass);
    let hidden = backend.upload(&cases.numbers(width * 64), 64);
    let qkv = backend.upload(&cases.numbers(width * HEADS.qkv_dim()), HEADS.qkv_dim());
    let mut batch = Batch::new(&fixture.memory, &[], &mut slots);
    backend.append_tail(0, &qkv, HEADS, &mut batch);
    let mut out = backend.buffer();
    let attention = AttentionSpec::softmax(HEADS, KvScope::Both, 0.1);
    let time = seconds(backend, || {
        backend.attend_beams(0, &qkv, &attention, &batch, &mut out);
    })?;
    let flops = 4.0 * (width * context * HEADS.query_dim()) as f64;
    let numbers = context * 2 * HEADS.kv_dim() + 2 * width * HEADS.query_dim();
    rates.say(&format!("attend_beams, {width} over {context}"), time, flops, numbers)?;
    if context != 1000 {
        return Ok(());
    }
    let start = Instant::now();
    let count = if B::COMPUTES_ON_CALLERS { 5 } else { 50 };
    for _ in 0..count {
        let mut again = [backend.open_slot(spec.clone())?];
        for (hidden, rule) in [&first, &hidden].into_iter().zip(&rules) {
            let mut pass = Batch::new(&fixture.memory, &[], &mut again);
            backend.lm_head(hidden, head, rule, &mut pass, &mut logits);
            backend.advance_beams(&logits, head, rule, &mut pass);
        }
        backend.read_beams(&[&again[0]]).remove(0)?;
    }
    let time = start.elapsed().as_secs_f64() / f64::from(count);
    say(&format!(
        "two levels of a search, {width} beams, 200,000 items, with the head, read back: {:.0} us",
        time * 1e6
    ))
}
