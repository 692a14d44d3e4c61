//! `sidereal bench`: latency, throughput, where the time goes.

use std::collections::HashSet;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use clap::{ArgGroup, Args};
use indicatif::{ProgressBar, ProgressStyle};
use sidereal::catalog::{Change, Item};
use sidereal::lines::Lines;
use sidereal::wire::{RequestDefaults, RequestLine};
use sidereal::{CatalogWriter, Error, Input, Phases, Recommender, Request, Result};

use super::arguments::{
    MAP_CATALOG_ABOVE_MIB, ModelArguments, Outcome, SearchArguments, say, write_error,
};
use super::device::DeviceArguments;
use super::load::{self, LoadArguments, Source};
use super::measure::{Machine, Ticks, cpu_time, peak_memory_bytes};
use super::report::{
    Churn, Latency, OpenLoad, PhaseSeconds, Report, Rounds, Seconds, Settings, to_json, to_text,
};
use super::shapes::Shape;
use super::tally::Tally;

#[derive(Args)]
#[command(group(ArgGroup::new("what").required(true).args(["model", "shape"])))]
#[command(after_help = "\
With --concurrency C, C callers send a request each and the next one when they
have the answer. With --batch B, requests are handed over B at a time, and the
next group when all are answered. With --rate or --sweep, requests arrive by
themselves, and a latency counts from when its request was due.

Examples:
  sidereal bench --shape tiger --beams 50 --history 20 --threads 1
  sidereal bench --model DIR --requests requests.jsonl --concurrency 16 --json
  sidereal bench --shape tiger --threads 1 --repeat 50 --churn 1
  sidereal bench --model DIR --sweep --bound 20 --plot latency.svg
  sidereal bench --shape qwen3-small --prefix-cache --returning 90")]
pub struct Arguments {
    /// Model folder; or else --shape
    #[arg(long, value_name = "DIR")]
    model: Option<PathBuf>,
    /// Folder of an adapter's base, where adapter_config.json does not name it
    #[arg(long, value_name = "DIR", requires = "model")]
    base: Option<PathBuf>,
    /// Catalog: a built one, or a file of items; by default the one beside the model
    #[arg(long, value_name = "FILE", requires = "model")]
    catalog: Option<PathBuf>,
    /// A model known by its shape, with random weights and items
    #[arg(long)]
    shape: Option<Shape>,
    /// Items of the shape's catalog; by default as many as its models were published with
    #[arg(long, value_name = "N", requires = "shape", value_parser = clap::value_parser!(u32).range(1..=50_000_000))]
    items: Option<u32>,
    /// Requests to repeat; by default random histories
    #[arg(long, value_name = "FILE", requires = "model")]
    requests: Option<PathBuf>,
    /// Items of a random history
    #[arg(long, default_value_t = 20, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    history: u32,
    #[command(flatten)]
    search: SearchArguments,
    #[command(flatten)]
    device: DeviceArguments,
    /// Callers, each with one request on its way at a time
    #[arg(long, default_value_t = 1, value_name = "C", value_parser = clap::value_parser!(u32).range(1..=4096))]
    concurrency: u32,
    /// Requests that are handed over at a time, instead of callers
    #[arg(long, value_name = "B", conflicts_with = "concurrency", value_parser = clap::value_parser!(u32).range(1..))]
    batch: Option<u32>,
    #[command(flatten)]
    load: LoadArguments,
    /// Times that the requests are gone through
    #[arg(long, default_value_t = 5, value_name = "R", value_parser = clap::value_parser!(u32).range(1..))]
    repeat: u32,
    /// Keep contexts from request to request: those that are repeated are then not read again
    #[arg(long)]
    prefix_cache: bool,
    /// Change this many percent of the items a minute, in memory, half of the time, and compare
    #[arg(long, value_name = "PERCENT")]
    churn: Option<f64>,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

/// Random histories that are gone through where no requests are given.
const RANDOM_REQUESTS: usize = 16;

pub fn run(arguments: &Arguments) -> Result<Outcome> {
    arguments.load.check()?;
    let recommender = open(arguments)?;
    let mut defaults = arguments.search.defaults(1);
    defaults.top_k = defaults.beams;
    let requests = match &arguments.requests {
        Some(path) => read_requests(path, &defaults)?,
        None => random_requests(&recommender, arguments.history as usize, &defaults)?,
    };
    recommender.recommend(&requests[0])?; // warms caches and scratch memory, and fails early
    let mut plotted = None;
    let text = match arguments.load.is_open() {
        true => {
            let report = load::run_open(&recommender, &requests, &arguments.load)?;
            plotted = Some(report.clone());
            say_unknown_items(&recommender)?;
            let settings = settings(arguments, recommender.num_threads());
            let machine = Machine::measure_alone(&arguments.device, recommender)?;
            match arguments.json {
                true => to_json(&OpenLoad::new(report, settings, machine)),
                false => report.to_text(),
            }
        }
        false => {
            let (ticks, start, cpu_start) = (Ticks::now(), Instant::now(), cpu_time());
            let (run, churn) = match arguments.churn {
                None => (measure_rounds(&recommender, &requests, arguments)?, None),
                Some(percent) => {
                    let (run, churn) = measure_churn(&recommender, &requests, arguments, percent)?;
                    (run, Some(churn))
                }
            };
            let own = cpu_time().zip(cpu_start).map(|(end, start)| end - start);
            let others_share = ticks
                .zip(Ticks::now())
                .zip(own)
                .and_then(|((before, now), own)| before.others_share(now, own, start.elapsed()));
            say_unknown_items(&recommender)?;
            let settings = settings(arguments, recommender.num_threads());
            let machine = Machine::measure_alone(&arguments.device, recommender)?;
            let report = report(settings, run, churn, machine, others_share);
            match arguments.json {
                true => to_json(&report),
                false => to_text(&report),
            }
        }
    };
    writeln!(std::io::stdout(), "{text}").map_err(write_error(None))?;
    plotted.map_or(Ok(()), |report| arguments.load.plot(&report))?;
    Ok(Outcome::Done)
}

fn say_unknown_items(recommender: &Recommender) -> Result<()> {
    let count: u64 = recommender.metrics()?.unknown_items.iter().map(|(_, count)| count).sum();
    if count > 0 {
        say(&format!("left out names that the catalog does not have, {count} times in all"));
    }
    Ok(())
}

fn open(arguments: &Arguments) -> Result<Recommender> {
    let mut options = arguments.device.options();
    options.engine.prefix_cache = arguments.prefix_cache;
    if let Some(shape) = arguments.shape {
        let spinner = super::requests::spinner("drawing random weights");
        let recommender = shape.open(&options, arguments.items);
        spinner.finish_and_clear();
        return recommender;
    }
    let model = ModelArguments {
        model: arguments.model.clone().expect("required where there is no shape"),
        base: arguments.base.clone(),
        catalog: arguments.catalog.clone(),
        map_catalog_above: MAP_CATALOG_ABOVE_MIB,
        device: arguments.device.clone(),
    };
    model.open_with(&options)
}

fn read_requests(path: &Path, defaults: &RequestDefaults) -> Result<Vec<Request>> {
    let io = |error: std::io::Error| Error::io(path, error);
    let bad = |reason: String| Error::RequestsFile { path: path.to_path_buf(), reason };
    let file = std::fs::File::open(path).map_err(io)?;
    let mut requests = Vec::new();
    let mut lines = Lines::new(file);
    let mut number = 0;
    while let Some(line) = lines.next().map_err(io)? {
        number += 1;
        if line.is_blank() {
            continue;
        }
        let at_line = |reason: String| bad(format!("line {number}: {reason}"));
        let text = line.text().map_err(at_line)?;
        let request = RequestLine::parse(text).and_then(|line| line.to_request(defaults));
        requests.push(request.map_err(|error| at_line(error.to_string()))?);
    }
    match requests.is_empty() {
        true => Err(bad("there are no requests".into())),
        false => Ok(requests),
    }
}

fn random_requests(
    recommender: &Recommender,
    len: usize,
    defaults: &RequestDefaults,
) -> Result<Vec<Request>> {
    let catalog = recommender.catalog().snapshot();
    let items: Vec<u32> = catalog.all_items().collect();
    if items.is_empty() {
        let reason = "the catalog has no items to make histories of".into();
        return Err(Error::InvalidOption { option: "--catalog", reason });
    }
    let mut rng = fastrand::Rng::with_seed(1);
    let request = |_| {
        let item = |_| catalog.name(items[rng.usize(0..items.len())]).to_string();
        let history: Vec<String> = (0..len).map(item).collect();
        let line = serde_json::Map::from_iter([("history".into(), history.into())]);
        RequestLine::from_fields(line)?.to_request(defaults)
    };
    (0..RANDOM_REQUESTS).map(request).collect()
}

#[derive(Default)]
struct Run {
    latencies_ms: Vec<f64>,
    late: usize,
    refused: usize,
    seconds: f64,
    cpu_seconds: Option<f64>,
    /// None on a device, whose phases follow one another unseen.
    phases: Option<Phases>,
    matrix_flops: u64,
    cached_tokens_share: f64,
    /// By round.
    requests_per_second: Vec<f64>,
    p50_ms: Vec<f64>,
}

impl Run {
    fn add(&mut self, other: Run) {
        self.latencies_ms.extend(other.latencies_ms);
        self.late += other.late;
        self.refused += other.refused;
        self.seconds += other.seconds;
        let both = other.cpu_seconds.map(|seconds| self.cpu_seconds.unwrap_or(0.0) + seconds);
        self.cpu_seconds = both;
        if let Some(other) = other.phases {
            let phases = self.phases.get_or_insert_default();
            phases.prefill += other.prefill;
            phases.decode += other.decode;
            phases.search += other.search;
        }
        self.matrix_flops += other.matrix_flops;
        self.cached_tokens_share = other.cached_tokens_share;
        self.requests_per_second.extend(other.requests_per_second);
        self.p50_ms.extend(other.p50_ms);
    }

    fn latency(&self) -> Option<Latency> {
        let mut sorted = self.latencies_ms.clone();
        sorted.sort_by(f64::total_cmp);
        let last = sorted.len().checked_sub(1)?;
        let quantile = |share: f64| sorted[(last as f64 * share).round() as usize];
        let (p50, p95, p99) = (quantile(0.5), quantile(0.95), quantile(0.99));
        Some(Latency { p50, p95, p99, max: sorted[last] })
    }
}

/// How often changes are applied.
const CHANGES_EVERY: Duration = Duration::from_millis(10);

fn measure_churn(
    recommender: &Recommender,
    requests: &[Request],
    arguments: &Arguments,
    percent: f64,
) -> Result<(Run, Churn)> {
    if !(percent.is_finite() && percent > 0.0) {
        let reason = format!("{percent} is not a number of percent above zero");
        return Err(Error::InvalidOption { option: "--churn", reason });
    }
    let writer = CatalogWriter::in_memory(Arc::clone(recommender.catalog()), &Default::default())?;
    let snapshot = recommender.catalog().snapshot();
    // What a history names must stay; everything else may come and go.
    let named: HashSet<&str> = requests
        .iter()
        .filter_map(|request| match &request.input {
            Input::History(items) => Some(items.iter().map(String::as_str)),
            _ => None,
        })
        .flatten()
        .collect();
    let items: Vec<Item> = snapshot
        .all_items()
        .filter(|&item| !named.contains(snapshot.name(item)))
        .map(|item| snapshot.item(item))
        .collect();
    let per_second = percent / 100.0 * snapshot.num_items() as f64 / 60.0;
    let (mut still, mut changing) = (Run::default(), Run::default());
    let (mut changes, mut changing_seconds) = (0, 0.0);
    for _ in 0..arguments.repeat {
        still.add(measure(recommender, requests, arguments, 1)?);
        let done = AtomicBool::new(false);
        let start = Instant::now();
        let (run, changed) = std::thread::scope(|scope| {
            let change = scope.spawn(|| change_items(&writer, &items, per_second, &done));
            let run = measure(recommender, requests, arguments, 1);
            done.store(true, Ordering::Relaxed);
            (run, change.join().expect("the thread reports its errors"))
        });
        changing.add(run?);
        changes += changed?;
        changing_seconds += start.elapsed().as_secs_f64();
    }
    let (still_ms, changing_ms) = (still.latency(), changing.latency());
    let churn = Churn {
        percent_a_minute: percent,
        items: snapshot.num_items(),
        changes,
        changes_per_second: changes as f64 / changing_seconds,
        compactions: writer.num_compactions(),
        p99_ratio: changing_ms.zip(still_ms).map(|(changing, still)| changing.p99 / still.p99),
        still_ms,
        changing_ms,
    };
    still.add(changing);
    Ok((still, churn))
}

/// Deletes items, puts them back and tags them, so many a second, until it is `done`.
fn change_items(
    writer: &CatalogWriter,
    items: &[Item],
    per_second: f64,
    done: &AtomicBool,
) -> Result<usize> {
    let start = Instant::now();
    let (mut count, mut rng) = (0, fastrand::Rng::new());
    while !done.load(Ordering::Relaxed) && !items.is_empty() {
        let due = (start.elapsed().as_secs_f64() * per_second) as usize;
        let change = |_| {
            let item = &items[rng.usize(0..items.len())];
            match rng.u8(0..3) {
                0 => Change::Delete { item: item.name.clone() },
                1 => Change::Put(item.clone()),
                _ => Change::Tag {
                    item: item.name.clone(),
                    add: vec!["changed".into()],
                    remove: Vec::new(),
                },
            }
        };
        let changes: Vec<Change> = (count..due).map(change).collect();
        count = due;
        writer.apply(&changes)?;
        std::thread::sleep(CHANGES_EVERY);
    }
    Ok(count)
}

/// Rounds whose median is told, where there are enough requests for them.
const ROUNDS: u32 = 5;

fn measure_rounds(
    recommender: &Recommender,
    requests: &[Request],
    arguments: &Arguments,
) -> Result<Run> {
    let Arguments { repeat, concurrency, batch, .. } = *arguments;
    // A round that is short beside its beginning and end would measure those.
    let is_enough = requests.len() >= 4 * concurrency.max(batch.unwrap_or(1)) as usize;
    let rounds = if is_enough { repeat.min(ROUNDS) } else { 1 };
    let mut run = Run::default();
    for round in 0..rounds {
        let repeat = repeat / rounds + u32::from(round < repeat % rounds);
        run.add(measure(recommender, requests, arguments, repeat)?);
    }
    Ok(run)
}

fn measure(
    recommender: &Recommender,
    requests: &[Request],
    arguments: &Arguments,
    repeat: u32,
) -> Result<Run> {
    let count = requests.len() * repeat as usize;
    let bar = ProgressBar::new(count as u64);
    let style = ProgressStyle::with_template("{msg} {wide_bar} {pos}/{len} {per_sec} {elapsed}");
    let bar = bar.with_style(style.expect("a sound template")).with_message("requests");
    let mut latencies_ms = Vec::with_capacity(count);
    let before = recommender.status()?;
    let (start, cpu_start) = (Instant::now(), cpu_time());
    let mut source = Source::new(recommender, requests, &arguments.load);
    let mut cached_tokens_share = 0.0;
    let (mut late, mut refused) = (0, 0);
    match (arguments.batch, arguments.concurrency) {
        (None, 1) if !arguments.load.is_mixed() => {
            for request in (0..repeat).flat_map(|_| requests) {
                let start = Instant::now();
                recommender.recommend(request)?;
                latencies_ms.push(start.elapsed().as_secs_f64() * 1e3);
                bar.inc(1);
            }
        }
        (None, callers) => {
            let note = |latency: Duration| latencies_ms.push(latency.as_secs_f64() * 1e3);
            let callers = callers as usize;
            let load = load::closed_loop(recommender, &mut source, callers, count, &bar, note)?;
            cached_tokens_share = load.cached_tokens_share;
            (late, refused) = (load.late, load.refused);
        }
        (Some(batch), _) => {
            let drawn: Vec<Request> = (0..count).map(|_| source.draw()).collect();
            for group in drawn.chunks(batch as usize) {
                let start = Instant::now();
                let mut tally = Tally::new();
                recommender.recommend_all(group, |_, answer| {
                    let latency = start.elapsed();
                    if answer.is_ok() {
                        latencies_ms.push(latency.as_secs_f64() * 1e3);
                    }
                    tally.note(answer, latency, 0);
                    bar.inc(1);
                });
                let (group_late, group_refused) = tally.missed()?;
                (late, refused) = (late + group_late, refused + group_refused);
            }
        }
    }
    let seconds = start.elapsed().as_secs_f64();
    let cpu_seconds = cpu_time().zip(cpu_start).map(|(end, start)| (end - start).as_secs_f64());
    bar.finish_and_clear();
    let after = recommender.status()?;
    let phases = after.phases.zip(before.phases).map(|(after, before)| Phases {
        prefill: after.prefill - before.prefill,
        decode: after.decode - before.decode,
        search: after.search - before.search,
    });
    let mut run = Run {
        requests_per_second: vec![latencies_ms.len() as f64 / seconds],
        latencies_ms,
        late,
        refused,
        seconds,
        cpu_seconds,
        phases,
        matrix_flops: after.matrix_flops - before.matrix_flops,
        cached_tokens_share,
        p50_ms: Vec::new(),
    };
    run.p50_ms.extend(run.latency().map(|latency| latency.p50));
    Ok(run)
}

fn report(
    settings: Settings,
    run: Run,
    churn: Option<Churn>,
    machine: Machine,
    others_share: Option<f64>,
) -> Report {
    let requests = run.latencies_ms.len();
    let each = requests.max(1) as f64;
    let gflop = run.matrix_flops as f64 / 1e9;
    let matrix_gflops = gflop / run.seconds;
    let by_cpu = run.cpu_seconds.filter(|&seconds| seconds > 0.0).map(|seconds| gflop / seconds);
    let matrix_share = match by_cpu.zip(machine.matrix_gflops_per_cpu) {
        Some((own, most)) => own / most,
        None => matrix_gflops / machine.matrix_gflops,
    };
    Report {
        requests,
        requests_per_second: requests as f64 / run.seconds,
        latency_ms: run.latency(),
        late: run.late,
        refused: run.refused,
        cpu_ms_per_request: run.cpu_seconds.map(|seconds| seconds * 1e3 / each),
        others_share,
        rounds: Rounds::new(run.requests_per_second.clone(), run.p50_ms.clone()),
        seconds: Seconds {
            total: run.seconds,
            phases: run.phases.map(|phases| PhaseSeconds {
                prefill: phases.prefill.as_secs_f64(),
                decode: phases.decode.as_secs_f64(),
                search: phases.search.as_secs_f64(),
            }),
        },
        matrix_gflops,
        matrix_share,
        gflop_per_request: gflop / each,
        cached_tokens_share: run.cached_tokens_share,
        peak_memory_bytes: peak_memory_bytes(),
        churn,
        settings,
        machine,
    }
}

fn settings(arguments: &Arguments, threads: usize) -> Settings {
    let model = match (&arguments.model, arguments.shape) {
        (Some(path), _) => path.display().to_string(),
        (None, shape) => {
            let value = shape.and_then(|shape| clap::ValueEnum::to_possible_value(&shape));
            value.map(|value| value.get_name().to_string()).unwrap_or_default()
        }
    };
    let defaults = arguments.search.defaults(1);
    Settings {
        model,
        requests: arguments.requests.as_ref().map(|path| path.display().to_string()),
        history: arguments.requests.is_none().then_some(arguments.history),
        beams: defaults.beams,
        widths: defaults.widths,
        prefix_cache: arguments.prefix_cache,
        normalize: defaults.normalization,
        constraint: defaults.constraint,
        concurrency: arguments.concurrency,
        batch: arguments.batch,
        repeat: arguments.repeat,
        threads,
        version: env!("CARGO_PKG_VERSION"),
    }
}
