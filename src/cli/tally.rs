//! What became of the requests of a load.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use hdrhistogram::Histogram;
use serde::Serialize;
use sidereal::{Answer, Error, Recommender, Result};

use super::measure::cpu_time;

/// What became of the requests of one load.
#[derive(Serialize, Clone, Default)]
pub struct LoadReport {
    /// Requests that arrived a second; none where callers wait for their answers.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub offered_per_second: Option<f64>,
    pub answered_per_second: f64,
    pub answered: usize,
    /// Refused because too many waited, or because they would have been late behind others.
    pub refused: usize,
    /// Not answered before their deadline.
    pub late: usize,
    /// Of those answered.
    /// `None` where none were.
    pub latency_ms: Option<LatencyReport>,
    /// By the length of the history, where lengths are mixed.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub by_history: Vec<HistoryReport>,
    /// Tokens of contexts that were there from earlier requests, as a share of all.
    pub cached_tokens_share: f64,
    pub gflop_per_request: f64,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cpu_ms_per_request: Option<f64>,
    pub seconds: f64,
}

/// Requests whose histories have a number of items.
#[derive(Serialize, Clone)]
pub struct HistoryReport {
    pub items: usize,
    pub answered: usize,
    pub latency_ms: Option<LatencyReport>,
}

#[derive(Serialize, Clone, Copy)]
pub struct LatencyReport {
    pub p50: f64,
    pub p90: f64,
    pub p95: f64,
    pub p99: f64,
    pub p999: f64,
    pub max: f64,
}

/// The quantiles of a table: of nothing, nothing is said.
pub fn columns(latency_ms: Option<&LatencyReport>) -> String {
    let show = |pick: fn(&LatencyReport) -> f64| match latency_ms {
        Some(latency) => format!("{:7.2}", pick(latency)),
        None => format!("{:>7}", "-"),
    };
    let columns = [show(|it| it.p50), show(|it| it.p95), show(|it| it.p99), show(|it| it.max)];
    columns.join("  ")
}

impl LatencyReport {
    fn new(latencies_us: &Histogram<u64>) -> Option<LatencyReport> {
        if latencies_us.is_empty() {
            return None;
        }
        let ms = |quantile: f64| latencies_us.value_at_quantile(quantile) as f64 / 1e3;
        Some(LatencyReport {
            p50: ms(0.5),
            p90: ms(0.9),
            p95: ms(0.95),
            p99: ms(0.99),
            p999: ms(0.999),
            max: latencies_us.max() as f64 / 1e3,
        })
    }
}

/// Collects outcomes.
pub struct Tally {
    latencies_us: Histogram<u64>,
    /// By the length of the history.
    by_history_us: BTreeMap<usize, Histogram<u64>>,
    refused: usize,
    late: usize,
    tokens: usize,
    cached_tokens: usize,
    failure: Option<Error>,
}

impl Tally {
    pub fn new() -> Tally {
        Tally {
            latencies_us: histogram(),
            by_history_us: BTreeMap::new(),
            refused: 0,
            late: 0,
            tokens: 0,
            cached_tokens: 0,
            failure: None,
        }
    }

    pub fn note(&mut self, answer: Result<Answer>, latency: Duration, num_items: usize) {
        match answer {
            Ok(answer) => {
                let by_history = self.by_history_us.entry(num_items).or_insert_with(histogram);
                for histogram in [&mut self.latencies_us, by_history] {
                    let recorded = histogram.record(latency.as_micros() as u64);
                    recorded.expect("a histogram that grows has room");
                }
                self.tokens += answer.tokens;
                self.cached_tokens += answer.cached_tokens;
            }
            Err(
                Error::Overloaded { .. } | Error::DeadlineExceeded { retry_after_ms: Some(_), .. },
            ) => self.refused += 1,
            Err(Error::DeadlineExceeded { .. }) => self.late += 1,
            Err(error) => {
                self.failure.get_or_insert(error);
            }
        }
    }

    /// How many were late and how many refused.
    ///
    /// # Errors
    /// The first failure of another kind.
    pub fn missed(self) -> Result<(usize, usize)> {
        self.failure.map_or(Ok((self.late, self.refused)), Err)
    }

    pub fn add(&mut self, other: Tally) {
        self.latencies_us.add(&other.latencies_us).expect("histograms of one kind");
        for (items, latencies_us) in other.by_history_us {
            let own = self.by_history_us.entry(items).or_insert_with(histogram);
            own.add(latencies_us).expect("histograms of one kind");
        }
        self.refused += other.refused;
        self.late += other.late;
        self.tokens += other.tokens;
        self.cached_tokens += other.cached_tokens;
        self.failure = self.failure.take().or(other.failure);
    }
}

fn histogram() -> Histogram<u64> {
    Histogram::new(3).expect("three digits are few")
}

/// What is counted from a moment on.
pub struct Since {
    pub start: Instant,
    cpu: Option<Duration>,
    flops: u64,
}

impl Since {
    pub fn now(recommender: &Recommender) -> Result<Since> {
        let flops = recommender.status()?.matrix_flops;
        Ok(Since { start: Instant::now(), cpu: cpu_time(), flops })
    }

    pub fn report(
        &self,
        recommender: &Recommender,
        offered: Option<f64>,
        tally: Tally,
        is_mixed: bool,
    ) -> Result<LoadReport> {
        if let Some(failure) = tally.failure {
            return Err(failure);
        }
        let seconds = self.start.elapsed().as_secs_f64();
        let end = Since::now(recommender)?;
        let answered = tally.latencies_us.len() as usize;
        let each = answered.max(1) as f64;
        let by_history = tally.by_history_us.iter().map(|(&items, latencies_us)| HistoryReport {
            items,
            answered: latencies_us.len() as usize,
            latency_ms: LatencyReport::new(latencies_us),
        });
        Ok(LoadReport {
            offered_per_second: offered,
            answered_per_second: answered as f64 / seconds,
            answered,
            refused: tally.refused,
            late: tally.late,
            latency_ms: LatencyReport::new(&tally.latencies_us),
            by_history: if is_mixed { by_history.collect() } else { Vec::new() },
            cached_tokens_share: tally.cached_tokens as f64 / tally.tokens.max(1) as f64,
            gflop_per_request: (end.flops - self.flops) as f64 / each / 1e9,
            cpu_ms_per_request: end
                .cpu
                .zip(self.cpu)
                .map(|(end, start)| (end - start).as_secs_f64() * 1e3 / each),
            seconds,
        })
    }
}
