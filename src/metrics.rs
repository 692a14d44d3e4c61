//! Counters, gauges and latency histograms of an engine, for doors to export.
//!
//! An engine records into one [`Metrics`] with relaxed atomics and no lock. On one core of an AMD EPYC
//! that takes 0.13 microseconds a step, most of it for two readings of the clock, and 0.08 microseconds
//! a request.
//!
//! A door takes a [`MetricsSnapshot`] when it is scraped
//! ([`Recommender::metrics`](crate::Recommender::metrics)), and renders it as
//! [Prometheus text](MetricsSnapshot::to_prometheus).
//!
//! The calls that record also emit `tracing` events, and the engine opens a span for each `request` and
//! each `step`, all with the target `sidereal`. Where no subscriber wants them, they cost a comparison.
//!
//! Times come in as arguments, in microseconds; this module has no clock.

use std::fmt::Write as _;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use crate::answer::{Timings, UnknownByField};
use crate::error::{CODES, Error};

/// Upper bounds of the buckets for times, in microseconds: they resolve 1 to 200 ms best.
pub(crate) const TIME_BOUNDS_US: [u64; 23] = [
    100, 200, 500, 1_000, 2_000, 3_000, 5_000, 7_500, 10_000, 15_000, 20_000, 30_000, 50_000,
    75_000, 100_000, 150_000, 200_000, 300_000, 500_000, 1_000_000, 2_000_000, 5_000_000,
    10_000_000,
];
/// Upper bounds of the buckets for rows of a step.
const ROW_BOUNDS: [u64; 14] = [1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1_024, 2_048, 4_096, 8_192];
/// Fields of a request whose unknown names are counted, in the order of [`UnknownByField`].
const UNKNOWN_FIELDS: [&str; 3] = ["history", "candidates", "only"];
/// Levels with a histogram of their own; deeper ones are counted with the last.
const NUM_LEVELS: usize = 8;

/// Pages of memory by owner.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct PageCounts {
    /// Context pages that nobody holds.
    pub context_free: u64,
    /// Context pages that the prefix cache holds; running requests may hold them as well.
    pub context_cached: u64,
    /// Context pages that only running requests hold.
    pub context_running: u64,
    /// Tail pages that nobody holds.
    pub tail_free: u64,
    /// Tail pages that requests hold.
    pub tail_running: u64,
}

/// What an engine holds at the moment of a snapshot.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Gauges {
    /// Requests that wait, in the queue or for pages.
    pub waiting: u64,
    /// Requests that run.
    pub running: u64,
    /// Pages by owner.
    pub pages: PageCounts,
    /// How long all requests that wait and run will take, as predicted, in microseconds.
    pub backlog_us: u64,
    /// Pages that the prefix cache dropped to make room, since the engine was opened.
    pub evicted_pages: u64,
    /// The snapshot of the catalog that new requests see.
    pub catalog_snapshot: u64,
    /// The version of the weights that answer new requests.
    pub weights_version: u64,
}

/// Counts of values up to each of a row of bounds.
#[derive(Debug)]
pub(crate) struct Histogram<const BUCKETS: usize> {
    bounds: &'static [u64],
    /// One more than there are bounds: the last counts what is over all of them.
    counts: [AtomicU64; BUCKETS],
    sum: AtomicU64,
}

impl<const BUCKETS: usize> Histogram<BUCKETS> {
    pub(crate) fn new(bounds: &'static [u64]) -> Histogram<BUCKETS> {
        assert_eq!(bounds.len() + 1, BUCKETS, "a bucket for each bound and one for the rest");
        Histogram { bounds, counts: [const { AtomicU64::new(0) }; BUCKETS], sum: AtomicU64::new(0) }
    }

    pub(crate) fn record(&self, value: u64) {
        let bucket = self.bounds.partition_point(|&bound| bound < value);
        self.counts[bucket].fetch_add(1, Relaxed);
        self.sum.fetch_add(value, Relaxed);
    }

    pub(crate) fn snapshot(&self) -> HistogramSnapshot {
        let counts = self.counts.iter().map(|count| count.load(Relaxed)).collect();
        HistogramSnapshot { bounds: self.bounds, counts, sum: self.sum.load(Relaxed) }
    }
}

pub(crate) type Times = Histogram<{ TIME_BOUNDS_US.len() + 1 }>;
type Rows = Histogram<{ ROW_BOUNDS.len() + 1 }>;
type ByCode = [AtomicU64; CODES.len()];

/// Everything that an engine counts. Shared by reference between its threads and its doors.
#[derive(Debug)]
pub struct Metrics {
    answered: AtomicU64,
    cancelled: AtomicU64,
    deadline_exceeded: AtomicU64,
    refused: ByCode,
    failed: ByCode,
    request_us: Times,
    queued_us: Times,
    prefill_us: Times,
    level_us: [Times; NUM_LEVELS],
    step_us: Times,
    step_rows: Rows,
    prompt_tokens: AtomicU64,
    cache_hits: AtomicU64,
    cache_misses: AtomicU64,
    cache_hit_tokens: AtomicU64,
    cache_tokens: AtomicU64,
    unknown_items: [AtomicU64; UNKNOWN_FIELDS.len()],
    refused_by_forecast: AtomicU64,
    predicted_us: AtomicU64,
    worked_us: AtomicU64,
}

impl Default for Metrics {
    fn default() -> Metrics {
        Metrics {
            answered: AtomicU64::new(0),
            cancelled: AtomicU64::new(0),
            deadline_exceeded: AtomicU64::new(0),
            refused: [const { AtomicU64::new(0) }; CODES.len()],
            failed: [const { AtomicU64::new(0) }; CODES.len()],
            request_us: Times::new(&TIME_BOUNDS_US),
            queued_us: Times::new(&TIME_BOUNDS_US),
            prefill_us: Times::new(&TIME_BOUNDS_US),
            level_us: std::array::from_fn(|_| Times::new(&TIME_BOUNDS_US)),
            step_us: Times::new(&TIME_BOUNDS_US),
            step_rows: Rows::new(&ROW_BOUNDS),
            prompt_tokens: AtomicU64::new(0),
            cache_hits: AtomicU64::new(0),
            cache_misses: AtomicU64::new(0),
            cache_hit_tokens: AtomicU64::new(0),
            cache_tokens: AtomicU64::new(0),
            unknown_items: [const { AtomicU64::new(0) }; UNKNOWN_FIELDS.len()],
            refused_by_forecast: AtomicU64::new(0),
            predicted_us: AtomicU64::new(0),
            worked_us: AtomicU64::new(0),
        }
    }
}

impl Metrics {
    /// Counts a request that was refused at submission.
    pub fn request_refused(&self, error: &Error) {
        tracing::debug!(target: "sidereal", code = error.code(), %error, "request refused");
        count_code(&self.refused, error);
    }

    /// Counts the names in a request that the catalog does not have and that were left out.
    pub fn items_unknown(&self, items: &UnknownByField) {
        if items.count() == 0 {
            return;
        }
        tracing::debug!(target: "sidereal", ?items, "unknown items left out");
        let UnknownByField { history, candidates, only } = items;
        for (counter, names) in self.unknown_items.iter().zip([history, candidates, only]) {
            counter.fetch_add(names.count as u64, Relaxed);
        }
    }

    /// Counts a request that got its pages, with the tokens of its context and those of them that
    /// the prefix cache had.
    pub fn request_admitted(&self, tokens: usize, cached_tokens: usize) {
        tracing::trace!(target: "sidereal", tokens, cached_tokens, "request admitted");
        let lookups = if cached_tokens > 0 { &self.cache_hits } else { &self.cache_misses };
        lookups.fetch_add(1, Relaxed);
        self.cache_hit_tokens.fetch_add(cached_tokens as u64, Relaxed);
        self.cache_tokens.fetch_add(tokens as u64, Relaxed);
    }

    /// Counts a request that was answered, and its times.
    pub fn request_answered(&self, timings: &Timings) {
        let Timings { queued_us, prefill_us, levels_us, total_us } = timings;
        tracing::debug!(
            target: "sidereal", queued_us, prefill_us, ?levels_us, total_us, "request answered"
        );
        self.answered.fetch_add(1, Relaxed);
        self.request_us.record(*total_us);
        self.queued_us.record(*queued_us);
        self.prefill_us.record(*prefill_us);
        for (level, &level_us) in levels_us.iter().enumerate() {
            self.level_us[level.min(NUM_LEVELS - 1)].record(level_us);
        }
    }

    /// Counts a request that was accepted and ended without an answer. [`Error::Cancelled`] and
    /// [`Error::DeadlineExceeded`] have counters of their own.
    pub fn request_failed(&self, error: &Error) {
        tracing::debug!(target: "sidereal", code = error.code(), %error, "request failed");
        match error {
            Error::Cancelled => _ = self.cancelled.fetch_add(1, Relaxed),
            Error::DeadlineExceeded { .. } => _ = self.deadline_exceeded.fetch_add(1, Relaxed),
            error => count_code(&self.failed, error),
        }
    }

    /// Counts a step: the rows that went through the network, the tokens of prompts among them, and
    /// how long the engine's thread took for it. A GPU is waited for in steps that end a request.
    pub fn step(&self, rows: usize, prompt_tokens: usize, took_us: u64) {
        tracing::trace!(target: "sidereal", rows, prompt_tokens, took_us, "step");
        self.step_us.record(took_us);
        self.step_rows.record(rows as u64);
        self.prompt_tokens.fetch_add(prompt_tokens as u64, Relaxed);
    }

    /// Counts a request that waited and was ended because of a forecast: `is_overloaded` where it
    /// would have been in time without those before it.
    pub fn request_forecast_late(&self, is_overloaded: bool) {
        self.refused_by_forecast.fetch_add(u64::from(is_overloaded), Relaxed);
    }

    /// Counts work that was done, with how long it had been predicted to take.
    pub fn work(&self, predicted_us: u64, took_us: u64) {
        self.predicted_us.fetch_add(predicted_us, Relaxed);
        self.worked_us.fetch_add(took_us, Relaxed);
    }

    /// The numbers at this moment, with those that the engine holds rather than counts. Calls that
    /// record meanwhile may be in some of the numbers only.
    pub fn snapshot(&self, gauges: Gauges) -> MetricsSnapshot {
        let read = |counter: &AtomicU64| counter.load(Relaxed);
        MetricsSnapshot {
            answered: read(&self.answered),
            cancelled: read(&self.cancelled),
            deadline_exceeded: read(&self.deadline_exceeded),
            refused: by_code(&self.refused),
            failed: by_code(&self.failed),
            request_us: self.request_us.snapshot(),
            queued_us: self.queued_us.snapshot(),
            prefill_us: self.prefill_us.snapshot(),
            level_us: self.level_us.iter().map(Histogram::snapshot).collect(),
            step_us: self.step_us.snapshot(),
            step_rows: self.step_rows.snapshot(),
            prompt_tokens: read(&self.prompt_tokens),
            cache_hits: read(&self.cache_hits),
            cache_misses: read(&self.cache_misses),
            cache_hit_tokens: read(&self.cache_hit_tokens),
            cache_tokens: read(&self.cache_tokens),
            unknown_items: std::array::from_fn(|at| {
                (UNKNOWN_FIELDS[at], read(&self.unknown_items[at]))
            }),
            refused_by_forecast: read(&self.refused_by_forecast),
            predicted_us: read(&self.predicted_us),
            worked_us: read(&self.worked_us),
            gauges,
        }
    }
}

fn count_code(counters: &ByCode, error: &Error) {
    let at = CODES.iter().position(|&code| code == error.code()).expect("CODES has them all");
    counters[at].fetch_add(1, Relaxed);
}

/// Codes that were counted, with their counts.
fn by_code(counters: &ByCode) -> Vec<(&'static str, u64)> {
    let counts = CODES.into_iter().zip(counters).map(|(code, count)| (code, count.load(Relaxed)));
    counts.filter(|&(_, count)| count > 0).collect()
}

/// A histogram at a moment.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct HistogramSnapshot {
    /// Upper bounds of the buckets, inclusive.
    pub bounds: &'static [u64],
    /// Values in each bucket, not summed up; the last bucket counts values over all bounds.
    pub counts: Vec<u64>,
    /// The sum of all values.
    pub sum: u64,
}

impl HistogramSnapshot {
    /// The number of values.
    pub fn count(&self) -> u64 {
        self.counts.iter().sum()
    }
}

/// The numbers of a [`Metrics`] at a moment. Counters count from the opening of the engine.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct MetricsSnapshot {
    /// Requests that were answered.
    pub answered: u64,
    /// Requests that their callers gave up.
    pub cancelled: u64,
    /// Requests whose deadline went by.
    pub deadline_exceeded: u64,
    /// Requests refused at submission, by error code.
    pub refused: Vec<(&'static str, u64)>,
    /// Requests that failed later, by error code.
    pub failed: Vec<(&'static str, u64)>,
    /// From submission to the answer.
    pub request_us: HistogramSnapshot,
    /// From submission to admission.
    pub queued_us: HistogramSnapshot,
    /// From admission to the end of the prompt.
    pub prefill_us: HistogramSnapshot,
    /// Each step of the search; the last histogram holds all deeper steps as well.
    pub level_us: Vec<HistogramSnapshot>,
    /// How long steps took.
    pub step_us: HistogramSnapshot,
    /// Rows of steps: tokens of prompts, and beams.
    pub step_rows: HistogramSnapshot,
    /// Tokens of prompts that were read.
    pub prompt_tokens: u64,
    /// Admitted requests that found a part of their context in the prefix cache.
    pub cache_hits: u64,
    /// Admitted requests that found none of it.
    pub cache_misses: u64,
    /// Tokens that the prefix cache had.
    pub cache_hit_tokens: u64,
    /// Tokens of all contexts of admitted requests.
    pub cache_tokens: u64,
    /// Names that requests gave, that the catalog did not have and that were left out, by field:
    /// `history`, `candidates`, `only`.
    pub unknown_items: [(&'static str, u64); 3],
    /// Requests that were refused because they would have been late behind others. They are counted
    /// in `deadline_exceeded` as well.
    pub refused_by_forecast: u64,
    /// What work was predicted to take before it was done, in microseconds.
    pub predicted_us: u64,
    /// What it took.
    pub worked_us: u64,
    /// What the engine holds.
    pub gauges: Gauges,
}

impl MetricsSnapshot {
    /// The numbers in Prometheus' text format (version 0.0.4). Names begin with `sidereal_`, units
    /// are seconds.
    pub fn to_prometheus(&self) -> String {
        let mut page = Page::default();
        let Gauges { waiting, running, pages, .. } = &self.gauges;
        let Gauges { backlog_us, evicted_pages, catalog_snapshot, weights_version, .. } =
            &self.gauges;
        page.gauge("requests_waiting", "Requests that wait.", *waiting);
        page.gauge("requests_running", "Requests that run.", *running);
        page.seconds("backlog_seconds", "gauge", "Predicted time for all of them.", *backlog_us);
        page.counter("requests_answered_total", "Requests answered.", self.answered);
        page.counter("requests_cancelled_total", "Requests given up by callers.", self.cancelled);
        let help = "Requests whose deadline went by.";
        page.counter("requests_deadline_exceeded_total", help, self.deadline_exceeded);
        let help = "Requests refused because they would have been late behind others.";
        page.counter("requests_refused_by_forecast_total", help, self.refused_by_forecast);
        let help = "What work was predicted to take.";
        page.seconds("work_predicted_seconds_total", "counter", help, self.predicted_us);
        page.seconds("work_seconds_total", "counter", "What it took.", self.worked_us);
        let help = "Requests refused at submission, by error code.";
        page.by_label("requests_refused_total", help, "code", &self.refused);
        let help = "Accepted requests that failed, by error code.";
        page.by_label("requests_failed_total", help, "code", &self.failed);

        let help = "From submission to the answer.";
        page.times("request_seconds", help, &[("", &self.request_us)]);
        let phases =
            [("phase=\"queued\"", &self.queued_us), ("phase=\"prefill\"", &self.prefill_us)];
        page.times("request_phase_seconds", "Phases of requests before the search.", &phases);
        let labels: Vec<String> =
            (0..self.level_us.len()).map(|level| format!("level=\"{level}\"")).collect();
        let levels: Vec<(&str, &HistogramSnapshot)> =
            labels.iter().map(String::as_str).zip(&self.level_us).collect();
        page.times("request_level_seconds", "Steps of searches, by level.", &levels);
        page.times("step_seconds", "Steps of the engine.", &[("", &self.step_us)]);
        page.header("step_rows", "Rows of steps of the engine.", "histogram");
        page.histogram("step_rows", "", &self.step_rows, 1.0);

        page.counter("prompt_tokens_total", "Tokens of prompts read.", self.prompt_tokens);
        let lookups = [("hit", self.cache_hits), ("miss", self.cache_misses)];
        let help = "Admitted requests, by whether the prefix cache had a part of their context.";
        page.by_label("prefix_cache_requests_total", help, "result", &lookups);
        let missed = self.cache_tokens.saturating_sub(self.cache_hit_tokens);
        let tokens = [("hit", self.cache_hit_tokens), ("miss", missed)];
        let help = "Tokens of contexts, by whether the prefix cache had them.";
        page.by_label("prefix_cache_tokens_total", help, "result", &tokens);
        let help = "Names left out of requests, as the catalog did not have them, by field.";
        page.by_label("unknown_items_total", help, "field", &self.unknown_items);
        let help = "Pages that the prefix cache dropped to make room.";
        page.counter("prefix_cache_evicted_pages_total", help, *evicted_pages);
        page.pages(pages);
        let help = "Snapshot of the catalog that new requests see.";
        page.gauge("catalog_snapshot", help, *catalog_snapshot);
        page.gauge("weights_version", "Version of the weights.", *weights_version);
        page.text
    }
}

/// A page of Prometheus text that is being written.
#[derive(Default)]
pub(crate) struct Page {
    pub(crate) text: String,
}

impl Page {
    pub(crate) fn header(&mut self, name: &str, help: &str, kind: &str) {
        self.line(format_args!("# HELP sidereal_{name} {help}"));
        self.line(format_args!("# TYPE sidereal_{name} {kind}"));
    }

    pub(crate) fn line(&mut self, line: std::fmt::Arguments<'_>) {
        writeln!(self.text, "{line}").expect("a text takes everything");
    }

    pub(crate) fn gauge(&mut self, name: &str, help: &str, value: u64) {
        self.header(name, help, "gauge");
        self.line(format_args!("sidereal_{name} {value}"));
    }

    pub(crate) fn counter(&mut self, name: &str, help: &str, value: u64) {
        self.header(name, help, "counter");
        self.line(format_args!("sidereal_{name} {value}"));
    }

    pub(crate) fn seconds(&mut self, name: &str, kind: &str, help: &str, us: u64) {
        self.header(name, help, kind);
        self.line(format_args!("sidereal_{name} {}", us as f64 / 1e6));
    }

    fn by_label(&mut self, name: &str, help: &str, label: &str, values: &[(&str, u64)]) {
        self.header(name, help, "counter");
        for (of, value) in values {
            self.line(format_args!("sidereal_{name}{{{label}=\"{of}\"}} {value}"));
        }
    }

    fn pages(&mut self, pages: &PageCounts) {
        self.header("pages", "Pages of memory, by what they hold and by owner.", "gauge");
        for (kind, owner, count) in [
            ("context", "free", pages.context_free),
            ("context", "cache", pages.context_cached),
            ("context", "requests", pages.context_running),
            ("tail", "free", pages.tail_free),
            ("tail", "requests", pages.tail_running),
        ] {
            let labels = format_args!("kind=\"{kind}\",owner=\"{owner}\"").to_string();
            self.line(format_args!("sidereal_pages{{{labels}}} {count}"));
        }
    }

    fn times(&mut self, name: &str, help: &str, histograms: &[(&str, &HistogramSnapshot)]) {
        self.header(name, help, "histogram");
        for (labels, histogram) in histograms {
            self.histogram(name, labels, histogram, 1e6);
        }
    }

    /// The samples of one histogram, whose values are `per_unit` times the unit shown.
    pub(crate) fn histogram(
        &mut self,
        name: &str,
        labels: &str,
        of: &HistogramSnapshot,
        per_unit: f64,
    ) {
        let (comma, braces) = match labels {
            "" => ("", String::new()),
            labels => (",", format!("{{{labels}}}")),
        };
        let mut so_far = 0;
        for (at, count) in of.counts.iter().enumerate() {
            so_far += count;
            let bound = match of.bounds.get(at) {
                Some(&bound) => (bound as f64 / per_unit).to_string(),
                None => "+Inf".to_string(),
            };
            self.line(format_args!(
                "sidereal_{name}_bucket{{{labels}{comma}le=\"{bound}\"}} {so_far}"
            ));
        }
        let sum = of.sum as f64 / per_unit;
        self.line(format_args!("sidereal_{name}_sum{braces} {sum}"));
        self.line(format_args!("sidereal_{name}_count{braces} {so_far}"));
    }
}
