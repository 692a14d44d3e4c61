//! Load: requests that arrive by themselves, or callers that wait for their answers.

use std::collections::VecDeque;
use std::future::Future;
use std::ops::ControlFlow;
use std::pin::Pin;
use std::sync::{Arc, Mutex, OnceLock, mpsc};
use std::task::{Context, Poll, Wake, Waker};
use std::time::{Duration, Instant};

use clap::Args;
use indicatif::{ProgressBar, ProgressStyle};
use serde::Serialize;
use sidereal::{Answer, Error, Handle, Input, Recommender, Request, Result};

use super::output::OutputFile;
use super::plot::plot;
use super::tally::{HistoryReport, LoadReport, Since, Tally, columns};

/// Load that arrives over time.
#[derive(Args)]
#[command(next_help_heading = "Load")]
pub struct LoadArguments {
    /// Requests arrive at random, so many a second on average, whether others are answered or not
    #[arg(long, value_name = "R")]
    rate: Option<f64>,
    /// Measure one load after the other, from a fifth of what the engine can do to more than that
    #[arg(long, conflicts_with = "rate")]
    sweep: bool,
    /// Seconds that each load lasts
    #[arg(long, value_name = "S", default_value_t = 10.0)]
    seconds: f64,
    /// Beam widths that requests are drawn from
    #[arg(long, value_name = "W,W,...", value_delimiter = ',')]
    mixed_beams: Vec<usize>,
    /// Lengths of histories, in items, that requests are drawn from
    #[arg(long, value_name = "N,N,...", value_delimiter = ',')]
    mixed_history: Vec<usize>,
    /// Percent of the requests that come from users who were there before and have one item more;
    /// some users come far more often than others (Zipf)
    #[arg(long, value_name = "PERCENT", default_value_t = 0.0)]
    returning: f64,
    /// Score so many random items for each request, instead of searching
    #[arg(long, value_name = "N", default_value_t = 0, value_parser = clap::builder::RangedU64ValueParser::<usize>::new().range(..=sidereal::MAX_BEAMS as u64))]
    candidates: usize,
    /// Milliseconds after which an answer is of no use
    #[arg(long, value_name = "MS")]
    deadline: Option<f64>,
    /// With --sweep: name the largest load whose 99th percentile stays below so many milliseconds
    #[arg(long, value_name = "MS", requires = "sweep")]
    bound: Option<f64>,
    /// With --sweep: draw latency against load, as SVG
    #[arg(long, value_name = "FILE", requires = "sweep")]
    plot: Option<std::path::PathBuf>,
}

impl LoadArguments {
    /// Whether requests arrive by themselves.
    pub fn is_open(&self) -> bool {
        self.rate.is_some() || self.sweep
    }

    /// Whether requests are more than the histories given.
    pub fn is_mixed(&self) -> bool {
        !self.mixed_beams.is_empty()
            || !self.mixed_history.is_empty()
            || self.returning > 0.0
            || self.candidates > 0
            || self.deadline.is_some()
    }

    /// Draws what was measured, where a picture was asked for.
    pub fn plot(&self, report: &OpenReport) -> Result<()> {
        self.plot.as_ref().map_or(Ok(()), |path| plot(path, &report.loads))
    }

    pub fn check(&self) -> Result<()> {
        let wrong = |option, value: f64| {
            let reason = format!("{value} is not a number above zero");
            Err(Error::InvalidOption { option, reason })
        };
        let is_positive = |value: f64| value.is_finite() && value > 0.0;
        if let Some(rate) = self.rate.filter(|&rate| !is_positive(rate) || rate > 1e6) {
            return wrong("--rate", rate);
        }
        if !is_positive(self.seconds) || self.seconds > 86_400.0 {
            return wrong("--seconds", self.seconds);
        }
        if let Some(deadline) = self.deadline.filter(|&ms| !is_positive(ms) || ms > 1e9) {
            return wrong("--deadline", deadline);
        }
        if !(0.0..=100.0).contains(&self.returning) {
            let reason = format!("{} is not between 0 and 100", self.returning);
            return Err(Error::InvalidOption { option: "--returning", reason });
        }
        if self.mixed_history.contains(&0) {
            return wrong("--mixed-history", 0.0);
        }
        Ok(())
    }
}

/// Items after which a user is replaced by another.
const MOST_ITEMS: usize = 1000;

/// Where requests are drawn from.
pub struct Source<'a> {
    arguments: &'a LoadArguments,
    /// Drawn from as they are, but for what is mixed.
    requests: &'a [Request],
    items: Vec<String>,
    rng: fastrand::Rng,
    /// Histories by user; those who came first come most often.
    users: Vec<Vec<String>>,
    next: usize,
}

impl<'a> Source<'a> {
    pub fn new(
        recommender: &Recommender,
        requests: &'a [Request],
        arguments: &'a LoadArguments,
    ) -> Source<'a> {
        let snapshot = recommender.catalog().snapshot();
        let items = snapshot.all_items().map(|item| snapshot.name(item).to_string()).collect();
        let rng = fastrand::Rng::with_seed(2);
        Source { arguments, requests, items, rng, users: Vec::new(), next: 0 }
    }

    fn random_items(&mut self, count: usize) -> Vec<String> {
        (0..count).map(|_| self.items[self.rng.usize(0..self.items.len())].clone()).collect()
    }

    /// Zipf over the users so far, by the inverse of its distribution: log-uniform ranks.
    fn returning_user(&mut self) -> usize {
        let rank = (self.users.len() as f64).powf(self.rng.f64()) as usize;
        rank.min(self.users.len()) - 1
    }

    pub fn draw(&mut self) -> Request {
        let mut request = self.requests[self.next % self.requests.len()].clone();
        self.next += 1;
        let LoadArguments { mixed_beams, mixed_history, returning, candidates, deadline, .. } =
            self.arguments;
        if let Some(&beams) = self.rng.choice(mixed_beams) {
            request.beams = beams;
            request.widths = Vec::new();
        }
        if let Some(&len) = self.rng.choice(mixed_history) {
            request.input = Input::History(self.random_items(len));
        }
        if *returning > 0.0 {
            let user = match self.rng.f64() * 100.0 < *returning && !self.users.is_empty() {
                true => {
                    let user = self.returning_user();
                    let more = match self.users[user].len() < MOST_ITEMS {
                        true => self.random_items(1),
                        false => {
                            // Nobody goes on for ever: another takes the place.
                            self.users[user].clear();
                            self.random_items(20)
                        }
                    };
                    self.users[user].extend(more);
                    user
                }
                false => {
                    let history = match &request.input {
                        Input::History(history) => history.clone(),
                        _ => self.random_items(20),
                    };
                    self.users.push(history);
                    self.users.len() - 1
                }
            };
            request.input = Input::History(self.users[user].clone());
            request.user = Some(user.to_string());
        }
        request.candidates = self.random_items(*candidates);
        request.deadline = deadline.map(|ms| Duration::from_secs_f64(ms / 1e3));
        request
    }
}

/// Items of a request's history.
fn num_items(request: &Request) -> usize {
    match &request.input {
        Input::History(items) => items.len(),
        _ => 0,
    }
}

/// Notes when an answer was there, whoever looks at it later.
#[derive(Default)]
struct Stamp(OnceLock<Instant>);

impl Wake for Stamp {
    fn wake(self: Arc<Self>) {
        self.0.get_or_init(Instant::now);
    }
}

/// A request on its way.
struct Sent {
    start: Instant,
    handle: Handle,
    stamp: Arc<Stamp>,
    num_items: usize,
}

impl Sent {
    /// The answer, where it is there already.
    fn new(
        mut handle: Handle,
        start: Instant,
        num_items: usize,
    ) -> ControlFlow<Result<Answer>, Sent> {
        let stamp = Arc::new(Stamp::default());
        let waker = Waker::from(Arc::clone(&stamp));
        match Pin::new(&mut handle).poll(&mut Context::from_waker(&waker)) {
            Poll::Ready(answer) => ControlFlow::Break(answer),
            Poll::Pending => ControlFlow::Continue(Sent { start, handle, stamp, num_items }),
        }
    }

    fn wait(self) -> (Result<Answer>, Duration) {
        let answer = self.handle.wait();
        let end = self.stamp.0.get().copied().unwrap_or_else(Instant::now);
        (answer, end - self.start)
    }
}

/// Requests arrive at random moments, `rate` a second on average (a Poisson process).
fn open_loop(
    recommender: &Recommender,
    source: &mut Source<'_>,
    rate: f64,
    seconds: f64,
    bar: &ProgressBar,
) -> Result<LoadReport> {
    let (since, before) = (Since::now(recommender)?, bar.position());
    let (sender, receiver) = mpsc::channel::<Sent>();
    let collected = std::thread::scope(|scope| {
        let collector = scope.spawn(move || {
            let mut tally = Tally::new();
            for sent in receiver {
                let num_items = sent.num_items;
                let (answer, latency) = sent.wait();
                tally.note(answer, latency, num_items);
            }
            tally
        });
        let mut own = Tally::new();
        let mut due = 0.0;
        while due < seconds {
            let arrival = since.start + Duration::from_secs_f64(due);
            let request = source.draw();
            std::thread::sleep(arrival.saturating_duration_since(Instant::now()));
            bar.set_position(before + (due * 1e3) as u64);
            // Whoever sends late has waited since the request was due.
            let num_items = num_items(&request);
            let sent = recommender.submit(request);
            match sent.map(|handle| Sent::new(handle, arrival, num_items)) {
                Ok(ControlFlow::Continue(sent)) => {
                    sender.send(sent).expect("the collector outlives the loop");
                }
                Ok(ControlFlow::Break(answer)) => own.note(answer, arrival.elapsed(), num_items),
                Err(error) => own.note(Err(error), Duration::ZERO, num_items),
            }
            due -= (1.0 - source.rng.f64()).ln() / rate;
        }
        drop(sender);
        let mut tally = collector.join().expect("the collector reports errors");
        tally.add(own);
        tally
    });
    let is_mixed = source.arguments.mixed_history.len() > 1;
    since.report(recommender, Some(rate), collected, is_mixed)
}

/// So many callers, each of whom sends its next request when it has its answer, until as many as
/// wanted are answered. The latency of each answer is handed over as it comes.
pub fn closed_loop(
    recommender: &Recommender,
    source: &mut Source<'_>,
    callers: usize,
    requests: usize,
    bar: &ProgressBar,
    mut each: impl FnMut(Duration),
) -> Result<LoadReport> {
    let drawn: VecDeque<Request> = (0..requests).map(|_| source.draw()).collect();
    let drawn = Mutex::new(drawn);
    let since = Since::now(recommender)?;
    let (sender, receiver) = mpsc::channel();
    let mut tally = Tally::new();
    std::thread::scope(|scope| {
        for _ in 0..callers {
            let (drawn, sender) = (&drawn, sender.clone());
            scope.spawn(move || {
                loop {
                    let next = drawn.lock().expect("no holder panics").pop_front();
                    let Some(request) = next else { return };
                    let (start, num_items) = (Instant::now(), num_items(&request));
                    let answer = recommender.submit(request).and_then(Handle::wait);
                    let latency = start.elapsed();
                    if sender.send((answer, latency, num_items)).is_err() {
                        return;
                    }
                }
            });
        }
        drop(sender);
        for (answer, latency, num_items) in receiver {
            if answer.is_ok() {
                each(latency);
            }
            bar.inc(1);
            tally.note(answer, latency, num_items);
        }
    });
    since.report(recommender, None, tally, source.arguments.mixed_history.len() > 1)
}

/// Loads that arrive by themselves, one after the other.
#[derive(Serialize, Clone)]
pub struct OpenReport {
    pub loads: Vec<LoadReport>,
    /// What callers who wait for their answers get done, for comparison; where loads were swept.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub capacity_per_second: Option<f64>,
    /// The largest load whose 99th percentile stayed below the bound.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub per_second_within_bound: Option<f64>,
}

/// Callers who wait that find out what the engine can do.
const CAPACITY_CALLERS: usize = 32;
/// Loads of a sweep, as shares of that.
const SWEEP: [f64; 8] = [0.2, 0.4, 0.6, 0.7, 0.8, 0.9, 1.0, 1.2];

pub fn run_open(
    recommender: &Recommender,
    requests: &[Request],
    arguments: &LoadArguments,
) -> Result<OpenReport> {
    if let Some(path) = &arguments.plot {
        // A measurement whose picture cannot be written is not begun.
        OutputFile::create(path).map_err(|error| Error::io(path, error))?;
    }
    let mut source = Source::new(recommender, requests, arguments);
    let seconds = arguments.seconds;
    let (mut rates, mut capacity) = (Vec::from_iter(arguments.rate), None);
    if arguments.sweep {
        let bar = super::requests::spinner("finding out what the engine can do");
        let start = Instant::now();
        let mut answered = 0;
        while start.elapsed().as_secs_f64() < seconds.min(5.0) {
            let hidden = ProgressBar::hidden();
            let count = 4 * CAPACITY_CALLERS;
            closed_loop(recommender, &mut source, CAPACITY_CALLERS, count, &hidden, |_| {})?;
            answered += count;
        }
        bar.finish_and_clear();
        let per_second = answered as f64 / start.elapsed().as_secs_f64();
        capacity = Some(per_second);
        rates = SWEEP.iter().map(|share| share * per_second).collect();
    }
    let bar = ProgressBar::new((seconds * 1e3) as u64 * rates.len() as u64);
    let style =
        ProgressStyle::with_template("{msg} {wide_bar} {percent} % {elapsed} of {duration}");
    let bar = bar.with_style(style.expect("a sound template"));
    let mut loads = Vec::new();
    for rate in rates {
        bar.set_message(format!("{rate:.0} requests/s"));
        loads.push(open_loop(recommender, &mut source, rate, seconds, &bar)?);
    }
    bar.finish_and_clear();
    let within = |bound: f64| {
        let holds = |load: &&LoadReport| {
            let is_fast = load.latency_ms.is_some_and(|latency| latency.p99 <= bound);
            is_fast && load.refused + load.late == 0
        };
        loads.iter().filter(holds).map(|load| load.answered_per_second).reduce(f64::max)
    };
    let per_second_within_bound = arguments.bound.and_then(within);
    Ok(OpenReport { loads, capacity_per_second: capacity, per_second_within_bound })
}

impl OpenReport {
    pub fn to_text(&self) -> String {
        let mut lines = vec![
            "offered/s  answered/s  refused  late   p50 ms   p95 ms   p99 ms   max ms  cached  GFLOP each"
                .to_string(),
        ];
        for load in &self.loads {
            lines.push(format!(
                "{:9.1}  {:10.1}  {:7}  {:4}  {}  {:4.0} %  {:10.3}",
                load.offered_per_second.unwrap_or(0.0),
                load.answered_per_second,
                load.refused,
                load.late,
                columns(load.latency_ms.as_ref()),
                load.cached_tokens_share * 100.0,
                load.gflop_per_request,
            ));
            for HistoryReport { items, answered, latency_ms } in &load.by_history {
                lines.push(format!(
                    "{:>9}  {answered:10}  {:>15}  {}",
                    "",
                    format!("of {items} items"),
                    columns(latency_ms.as_ref()),
                ));
            }
        }
        if let Some(capacity) = self.capacity_per_second {
            lines.push(format!(
                "{CAPACITY_CALLERS} callers who wait for their answers: {capacity:.1} requests/s"
            ));
        }
        if let Some(rate) = self.per_second_within_bound {
            lines.push(format!("within the bound: {rate:.1} requests/s"));
        }
        lines.join("\n")
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    #[test]
    fn users_who_came_first_come_most_often() {
        let mut rng = fastrand::Rng::with_seed(1);
        let mut counts: HashMap<usize, usize> = HashMap::new();
        for _ in 0..100_000 {
            let rank = (1000f64).powf(rng.f64()) as usize;
            *counts.entry(rank.min(1000) - 1).or_default() += 1;
        }
        // Log-uniform: the first has ln 2 / ln 1000 of all, about a tenth.
        assert!((9_500..10_600).contains(&counts[&0]), "{}", counts[&0]);
        assert!(counts[&0] > 5 * counts[&9]);
    }
}
