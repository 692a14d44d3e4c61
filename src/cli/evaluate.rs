//! `sidereal evaluate`: Recall and NDCG over requests whose next item is known.

use std::io::Write;
use std::path::{Path, PathBuf};

use clap::Args;
use serde::Serialize;
use sidereal::wire::RequestLine;
use sidereal::{Answer, Error, Request, Result};

use super::arguments::{ModelArguments, Outcome, SearchArguments, say, write_error};
use super::requests::{Delivery, Requests, answer_file};

#[derive(Args)]
#[command(after_help = "\
Each request line has a \"target\": the item that the user took next. With one target, Recall@K is the share
of requests that find it among the first K, and NDCG@K the mean of 1 / log2(rank + 1).

Example:
  sidereal evaluate --model models/industrial --requests models/industrial/test.jsonl --beams 20")]
pub struct Arguments {
    #[command(flatten)]
    model: ModelArguments,
    /// Requests with targets, one JSON object a line; - for the standard input
    #[arg(long, value_name = "FILE")]
    requests: PathBuf,
    #[command(flatten)]
    search: SearchArguments,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

const CUTOFFS: [usize; 3] = [5, 10, 20];

#[derive(Default)]
struct Tally {
    found: [u64; 3],
    gain: [f64; 3],
}

impl Tally {
    /// `rank` counts from one.
    fn add(&mut self, rank: Option<usize>) {
        for (at, cutoff) in CUTOFFS.into_iter().enumerate() {
            if let Some(rank) = rank.filter(|&rank| rank <= cutoff) {
                self.found[at] += 1;
                self.gain[at] += 1.0 / (rank as f64 + 1.0).log2();
            }
        }
    }

    fn metrics(&self, requests: u64) -> Metrics {
        let share = |sum: f64| sum / requests as f64;
        Metrics {
            recall_at_5: share(self.found[0] as f64),
            recall_at_10: share(self.found[1] as f64),
            recall_at_20: share(self.found[2] as f64),
            ndcg_at_5: share(self.gain[0]),
            ndcg_at_10: share(self.gain[1]),
            ndcg_at_20: share(self.gain[2]),
        }
    }
}

#[derive(Serialize)]
struct Metrics {
    recall_at_5: f64,
    recall_at_10: f64,
    recall_at_20: f64,
    ndcg_at_5: f64,
    ndcg_at_10: f64,
    ndcg_at_20: f64,
}

#[derive(Serialize)]
struct Report {
    requests: u64,
    failed: u64,
    /// Requests whose target the catalog does not have, which count as not found.
    unknown_targets: u64,
    /// Names in histories that the catalog does not have and that were left out.
    unknown_items: usize,
    /// Lines without a target, which were answered and could not be judged.
    without_target: u64,
    beams: usize,
    /// The target counts as found where its semantic ID is.
    by_sid: Metrics,
    /// The target counts as found where the item itself is, after those listed before it.
    by_item: Metrics,
    seconds: f64,
}

pub fn run(arguments: &Arguments) -> Result<Outcome> {
    let recommender = arguments.model.open()?;
    let start = std::time::Instant::now();
    let (mut by_sid, mut by_item) = (Tally::default(), Tally::default());
    let (mut requests, mut failed, mut unknown_targets, mut unknown_items) = (0, 0, 0, 0);
    let mut without_target = 0;
    let defaults = arguments.search.defaults(usize::MAX >> 1);
    // Their answers have no one list of items, and every target would count as not found.
    let check = |request: Request| {
        let fields = [("read", request.read.is_empty()), ("groups", request.groups.is_empty())];
        match fields.into_iter().find(|(_, is_empty)| !is_empty) {
            None => Ok(request),
            Some((field, _)) => {
                let reason = "its answers have no list of items to evaluate; leave it out".into();
                Err(Error::InvalidField { field, reason })
            }
        }
    };
    let lines = Requests::open(&arguments.requests)?;
    answer_file(&recommender, lines, &defaults, check, |delivery| {
        let Delivery::Answer(answered) = delivery else { return Ok(()) };
        let line = answered.line_number;
        let target = answered.line.as_ref().and_then(RequestLine::target);
        match (&answered.answer, target) {
            (Ok(answer), Some(target)) => {
                // What the catalog does not have cannot be found: a miss, and one to know of.
                let number = answer.snapshot.find(target);
                unknown_targets += u64::from(number.is_none());
                unknown_items += answer.unknown_items.history.count;
                let (sid_rank, item_rank) =
                    number.map_or((None, None), |number| ranks(answer, number));
                by_sid.add(sid_rank);
                by_item.add(item_rank);
            }
            (_, None) if answered.line.is_some() => {
                without_target += 1;
                return Ok(());
            }
            (Ok(_), None) => unreachable!("what was answered has a line"),
            (Err(error), _) => {
                say(&format!("line {line}: {error}"));
                failed += 1;
            }
        }
        requests += 1;
        Ok(())
    })?;
    if requests == 0 {
        let reason = match without_target {
            0 => "there are no requests".into(),
            count => format!("none of {count} requests has a \"target\", the item taken next"),
        };
        return Err(bad_requests(&arguments.requests, reason));
    }
    // A request that failed found nothing: it counts.
    let report = Report {
        requests,
        failed,
        unknown_targets,
        unknown_items,
        without_target,
        beams: defaults.beams,
        by_sid: by_sid.metrics(requests),
        by_item: by_item.metrics(requests),
        seconds: start.elapsed().as_secs_f64(),
    };
    let text = match arguments.json {
        true => serde_json::to_string_pretty(&report).expect("numbers have a JSON form"),
        false => to_text(&report),
    };
    writeln!(std::io::stdout(), "{text}").map_err(write_error(None))?;
    let is_nothing_known = failed + unknown_targets == requests;
    if is_nothing_known && unknown_targets > 0 {
        say("the catalog has none of the targets, so nothing was evaluated; \
             are requests and catalog of one data set?");
    }
    Ok(if failed == 0 && !is_nothing_known { Outcome::Done } else { Outcome::SomeFailed })
}

fn bad_requests(path: &Path, reason: String) -> Error {
    Error::RequestsFile { path: path.to_path_buf(), reason }
}

/// The target's rank, from one, by semantic ID and by item.
fn ranks(answer: &Answer, target: u32) -> (Option<usize>, Option<usize>) {
    let (target, target_sid) = (answer.snapshot.name(target), answer.snapshot.sid(target));
    let mut sids: Vec<_> = answer.items.iter().map(|found| found.sid).collect();
    sids.dedup();
    let sid_rank = sids.iter().position(|&sid| sid == target_sid).map(|at| at + 1);
    let item_rank = answer.items.iter().position(|found| found.item == target).map(|at| at + 1);
    (sid_rank, item_rank)
}

fn to_text(report: &Report) -> String {
    let row = |name: &str, metrics: &Metrics| {
        format!(
            "{name:<16}{:>10.4}{:>10.4}{:>10.4}{:>10.4}{:>10.4}{:>10.4}",
            metrics.recall_at_5,
            metrics.recall_at_10,
            metrics.recall_at_20,
            metrics.ndcg_at_5,
            metrics.ndcg_at_10,
            metrics.ndcg_at_20,
        )
    };
    let mut unknown = String::new();
    if report.without_target > 0 {
        unknown +=
            &format!("{} lines have no \"target\" and were left out\n", report.without_target);
    }
    if report.unknown_targets > 0 {
        unknown += &format!(
            "{} targets are not in the catalog and count as not found\n",
            report.unknown_targets
        );
    }
    if report.unknown_items > 0 {
        unknown += &format!(
            "{} items of histories are not in the catalog and were left out\n",
            report.unknown_items
        );
    }
    format!(
        "{} requests, {} failed, beam width {}, {:.1} s\n{unknown}{:<16}{:>10}{:>10}{:>10}{:>10}{:>10}{:>10}\n{}\n{}",
        report.requests,
        report.failed,
        report.beams,
        report.seconds,
        "",
        "Recall@5",
        "Recall@10",
        "Recall@20",
        "NDCG@5",
        "NDCG@10",
        "NDCG@20",
        row("by semantic ID", &report.by_sid),
        row("by item", &report.by_item),
    )
}
