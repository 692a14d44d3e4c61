//! What `sidereal bench` reports, as JSON and for people.

use serde::Serialize;
use sidereal::{Constraint, Normalization};

use super::load::OpenReport;
use super::measure::Machine;
use super::tally::LatencyReport;

#[derive(Serialize)]
pub struct Report {
    pub requests: usize,
    pub requests_per_second: f64,
    /// Of answered requests; `None` where none was.
    pub latency_ms: Option<Latency>,
    /// Requests that were not answered in time, where they had a deadline.
    #[serde(skip_serializing_if = "is_zero")]
    pub late: usize,
    /// Requests that were refused because they would have been late, or because too many waited.
    #[serde(skip_serializing_if = "is_zero")]
    pub refused: usize,
    /// CPU time of all threads.
    pub cpu_ms_per_request: Option<f64>,
    /// What other processes took of the machine meanwhile.
    pub others_share: Option<f64>,
    /// The same requests in several rounds, and what lies in the middle of them.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rounds: Option<Rounds>,
    /// Summed over threads.
    pub seconds: Seconds,
    /// Rate of matrix products over the whole run.
    pub matrix_gflops: f64,
    /// As a share of what the machine's kernel does, by CPU time where there is a figure of it:
    /// what others take of the machine then changes nothing.
    pub matrix_share: f64,
    pub gflop_per_request: f64,
    /// Tokens of contexts that were there from earlier requests.
    pub cached_tokens_share: f64,
    pub peak_memory_bytes: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub churn: Option<Churn>,
    pub settings: Settings,
    pub machine: Machine,
}

/// Rounds of a measurement.
#[derive(Serialize)]
pub struct Rounds {
    pub requests_per_second: Vec<f64>,
    pub p50_ms: Vec<f64>,
    pub median_requests_per_second: f64,
    pub median_p50_ms: f64,
}

impl Rounds {
    /// `None` of a single one.
    pub fn new(requests_per_second: Vec<f64>, p50_ms: Vec<f64>) -> Option<Rounds> {
        let median = |values: &[f64]| {
            let mut sorted = values.to_vec();
            sorted.sort_by(f64::total_cmp);
            sorted.get(sorted.len() / 2).copied()
        };
        let (per_second, p50) = (median(&requests_per_second)?, median(&p50_ms)?);
        (requests_per_second.len() > 1).then_some(Rounds {
            requests_per_second,
            p50_ms,
            median_requests_per_second: per_second,
            median_p50_ms: p50,
        })
    }
}

fn is_zero(count: &usize) -> bool {
    *count == 0
}

/// The same requests while nothing changed and while the catalog did, turn by turn.
#[derive(Serialize)]
pub struct Churn {
    pub percent_a_minute: f64,
    pub items: usize,
    pub changes: usize,
    pub changes_per_second: f64,
    /// Times that the catalog was compacted meanwhile.
    pub compactions: u64,
    pub still_ms: Option<Latency>,
    pub changing_ms: Option<Latency>,
    pub p99_ratio: Option<f64>,
}

#[derive(Serialize, Clone, Copy)]
pub struct Latency {
    pub p50: f64,
    pub p95: f64,
    pub p99: f64,
    pub max: f64,
}

#[derive(Serialize)]
pub struct Seconds {
    pub total: f64,
    /// Where the callers' threads compute: a device's phases follow one another unseen.
    #[serde(flatten)]
    pub phases: Option<PhaseSeconds>,
}

#[derive(Serialize)]
pub struct PhaseSeconds {
    pub prefill: f64,
    pub decode: f64,
    pub search: f64,
}

#[derive(Serialize)]
pub struct Settings {
    pub model: String,
    pub requests: Option<String>,
    /// Items of the random histories, where no requests were given.
    pub history: Option<u32>,
    pub beams: usize,
    /// By level, where they differ.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub widths: Vec<usize>,
    pub prefix_cache: bool,
    pub normalize: Option<Normalization>,
    pub constraint: Constraint,
    pub concurrency: u32,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub batch: Option<u32>,
    pub repeat: u32,
    pub threads: usize,
    pub version: &'static str,
}

pub fn to_json(report: &impl Serialize) -> String {
    serde_json::to_string_pretty(report).expect("numbers have a JSON form")
}

#[derive(Serialize)]
pub struct OpenLoad {
    /// Of the load, where there is one: the fields that a closed load has as well.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub requests_per_second: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub latency_ms: Option<LatencyReport>,
    #[serde(flatten)]
    pub report: OpenReport,
    pub settings: Settings,
    pub machine: Machine,
}

impl OpenLoad {
    pub fn new(report: OpenReport, settings: Settings, machine: Machine) -> OpenLoad {
        let only = if let [only] = &report.loads[..] { Some(only) } else { None };
        let requests_per_second = only.map(|load| load.answered_per_second);
        let latency_ms = only.and_then(|load| load.latency_ms);
        OpenLoad { requests_per_second, latency_ms, report, settings, machine }
    }
}

fn quantiles(latency: Option<Latency>) -> String {
    let Some(Latency { p50, p95, p99, max }) = latency else {
        return "none: no request was answered".into();
    };
    format!("p50 {p50:.2} ms, p95 {p95:.2}, p99 {p99:.2}, max {max:.2}")
}

/// What others may take of a machine before a person should know.
const BUSY: f64 = 0.1;

pub fn to_text(report: &Report) -> String {
    let Report { latency_ms, seconds, machine, settings, .. } = report;
    let time = seconds.phases.as_ref().map_or(String::new(), |phases| {
        let share = |part: f64| 100.0 * part / (phases.prefill + phases.decode + phases.search);
        format!(
            "time     prefill {:.0} %, decode {:.0} %, head and search {:.0} %\n",
            share(phases.prefill),
            share(phases.decode),
            share(phases.search)
        )
    });
    let missed = match (report.late, report.refused) {
        (0, 0) => String::new(),
        (late, refused) => format!("missed   {late} were late, {refused} refused\n"),
    };
    let cpu =
        report.cpu_ms_per_request.map_or(String::new(), |ms| format!(", {ms:.2} ms of CPU each"));
    let others = match report.others_share {
        Some(share) if share >= BUSY => {
            format!("\nbusy     others took {:.0} % of the machine meanwhile", share * 100.0)
        }
        _ => String::new(),
    };
    let rounds = report.rounds.as_ref().map_or(String::new(), |rounds| {
        let all = &rounds.requests_per_second;
        let (least, most) = all
            .iter()
            .fold((f64::INFINITY, 0f64), |(least, most), &rate| (least.min(rate), most.max(rate)));
        format!(
            "rounds   {}, median {:.1} requests/s ({least:.1} to {most:.1}), p50 {:.2} ms\n",
            all.len(),
            rounds.median_requests_per_second,
            rounds.median_p50_ms,
        )
    });
    let memory = report.peak_memory_bytes.map_or("unknown".into(), |bytes| {
        format!("{:.0} MiB at most", bytes as f64 / f64::from(1 << 20))
    });
    let churn = report.churn.as_ref().map_or(String::new(), |churn| {
        format!(
            "\nchanges  {:.0} a second, {} in all, on {} items, compacted {} times\n\
             still    {}\nchanging {}{}",
            churn.changes_per_second,
            churn.changes,
            churn.items,
            churn.compactions,
            quantiles(churn.still_ms),
            quantiles(churn.changing_ms),
            churn.p99_ratio.map_or(String::new(), |ratio| format!("; p99 {ratio:.2} times")),
        )
    });
    format!(
        "{} on {} ({} cores, {} threads used, {})\n\
         {} requests of {} beams, {} at a time: {:.1} requests/s{cpu}\n\
         latency  {}\n{missed}{rounds}\
         {time}matrices {:.1} GFLOP/s; by CPU time {:.0} % of what the kernel does in large products; {:.3} GFLOP each\n\
         contexts {:.0} % of the tokens were there from earlier requests\n\
         memory   {memory}{churn}{others}",
        settings.model,
        machine.cpu,
        machine.cores,
        settings.threads,
        machine.matrix_kernel,
        report.requests,
        settings.beams,
        settings.concurrency,
        report.requests_per_second,
        quantiles(*latency_ms),
        report.matrix_gflops,
        report.matrix_share * 100.0,
        report.gflop_per_request,
        report.cached_tokens_share * 100.0,
    )
}
