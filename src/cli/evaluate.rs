//! `sidereal evaluate`: Recall and NDCG over requests whose next item is known.

use std::collections::BTreeMap;
use std::io::Write;
use std::path::{Path, PathBuf};

use clap::Args;
use serde::Serialize;
use sidereal::wire::RequestDefaults;
use sidereal::{Error, MAX_BEAMS, ModelKind, Recommender, Request, Result};

use super::arguments::{ModelArguments, Outcome, SearchArguments, say, write_error};
use super::evaluation::{Metrics, Spread, SpreadReport, Tally, ranks};
use super::output::OutputFile;
use super::plot::{Curve, plot_recall};
use super::requests::{Answered, Delivery, Requests, answer_file};
use super::terminal::printable;

#[derive(Args)]
#[command(after_help = "\
Each request line has a \"target\": the item that the user took next. With one
target, Recall@K is the share of requests that find it among the first K, and
NDCG@K the mean of 1 / log2(rank + 1). Lines with a \"segment\", as \"new\" or
\"returning\", are reported by segment as well. Coverage@K is the share of the
catalog that stands in some list, popularity@K the number of this file's
histories that a recommended item stands in, on average. A network that gives
vectors (sidereal retrieve) is judged by lists of the last K; options of beams
do not concern it.

Examples:
  sidereal evaluate --model DIR --requests test.jsonl --beams 20 --at 1,5,20
  sidereal evaluate --model DIR --requests test.jsonl --exclude-history --json
  sidereal evaluate --model DIR --requests test.jsonl --widths 5,10,20,50
  sidereal evaluate --model DIR --requests test.jsonl --widths 5,50 --plot w.svg")]
pub struct Arguments {
    #[command(flatten)]
    model: ModelArguments,
    /// Requests with targets, one JSON object a line; - for the standard input
    #[arg(long, value_name = "FILE")]
    requests: PathBuf,
    #[command(flatten)]
    search: SearchArguments,
    /// Lengths of lists to judge
    #[arg(long, value_name = "K,K,...", value_delimiter = ',', default_value = "5,10,20", value_parser = clap::value_parser!(u32).range(1..))]
    at: Vec<u32>,
    /// Evaluate at each of these beam widths, one after the other
    #[arg(long, value_name = "W,W,...", value_delimiter = ',', conflicts_with = "beams", value_parser = clap::value_parser!(u16).range(1..=MAX_BEAMS as i64))]
    widths: Vec<u16>,
    /// Draw recall against width into an SVG
    #[arg(long, value_name = "FILE", requires = "widths")]
    plot: Option<PathBuf>,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
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
    /// The beam width, where there are beams.
    #[serde(skip_serializing_if = "Option::is_none")]
    beams: Option<usize>,
    /// The target counts as found where its semantic ID is.
    by_sid: Metrics,
    /// The target counts as found where the item itself is, after those listed before it.
    by_item: Metrics,
    spread: SpreadReport,
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    segments: BTreeMap<String, SegmentReport>,
    seconds: f64,
}

#[derive(Serialize)]
struct SegmentReport {
    requests: u64,
    by_sid: Metrics,
    by_item: Metrics,
}

impl Report {
    fn is_nothing_known(&self) -> bool {
        self.unknown_targets > 0 && self.failed + self.unknown_targets == self.requests
    }
}

pub fn run(arguments: &Arguments) -> Result<Outcome> {
    let path = &arguments.requests;
    if arguments.widths.len() > 1 && path.as_os_str() == "-" {
        let reason = "the standard input is read once; name a file, or give one width".into();
        return Err(Error::InvalidOption { option: "--widths", reason });
    }
    if let Some(plot) = &arguments.plot {
        // A path that cannot be written to is said before anything is evaluated.
        OutputFile::create(plot).map_err(|error| Error::io(plot, error))?;
    }
    let recommender = arguments.model.open()?;
    let is_writer = recommender.kind() == ModelKind::Writer;
    if is_writer {
        let num_levels = recommender.catalog().snapshot().num_levels();
        arguments.search.defaults(1).check(num_levels)?;
    } else if !arguments.widths.is_empty() {
        let reason = "this network has no beams; leave it out".into();
        return Err(Error::InvalidOption { option: "--widths", reason });
    }
    let mut cutoffs: Vec<usize> = arguments.at.iter().map(|&at| at as usize).collect();
    cutoffs.sort_unstable();
    cutoffs.dedup();
    let mut defaults = arguments.search.defaults(usize::MAX >> 1);
    if let (false, Some(&last)) = (is_writer, cutoffs.last()) {
        defaults.top_k = last; // there are no beams to end the list
    }
    let widths = match &arguments.widths[..] {
        [] => vec![defaults.beams],
        widths => widths.iter().map(|&width| width.into()).collect(),
    };
    let mut reports = Vec::new();
    for &width in &widths {
        if !arguments.widths.is_empty() {
            (defaults.beams, defaults.widths) = (width, Vec::new());
        }
        let last = cutoffs.last().copied().unwrap_or(0);
        if last > width && is_writer {
            say(&format!(
                "a search of {width} beams finds {width} semantic IDs at most, so lists of {last} may be \
                 shorter; raise --beams to judge them"
            ));
        }
        let report = evaluate(&recommender, path, &defaults, &cutoffs)?;
        if !arguments.json {
            write(&to_text(&report, &cutoffs))?;
        }
        reports.push(report);
    }
    if arguments.json {
        write(&match &reports[..] {
            [report] if arguments.widths.is_empty() => to_json(report),
            reports => to_json(&serde_json::json!({ "widths": reports })),
        })?;
    }
    if let Some(plot) = &arguments.plot {
        let curve = |at: usize| Curve {
            name: format!("Recall@{}", cutoffs[at]),
            points: reports
                .iter()
                .map(|it| (it.beams.unwrap_or(0), it.by_item.recall[at]))
                .collect(),
        };
        plot_recall(plot, &(0..cutoffs.len()).map(curve).collect::<Vec<Curve>>())?;
    }
    if reports.iter().any(Report::is_nothing_known) {
        say("the catalog has none of the targets, so nothing was evaluated; \
             are requests and catalog of one data set?");
    }
    let is_well = reports.iter().all(|report| report.failed == 0 && !report.is_nothing_known());
    Ok(if is_well { Outcome::Done } else { Outcome::SomeFailed })
}

fn to_json(report: &impl Serialize) -> String {
    serde_json::to_string_pretty(report).expect("numbers have a JSON form")
}

fn write(text: &str) -> Result<()> {
    writeln!(std::io::stdout(), "{text}").map_err(write_error(None))
}

/// Recall by semantic ID and by item.
struct Both {
    by_sid: Tally,
    by_item: Tally,
}

impl Both {
    fn new(cutoffs: &[usize]) -> Both {
        Both { by_sid: Tally::new(cutoffs), by_item: Tally::new(cutoffs) }
    }

    fn add(&mut self, cutoffs: &[usize], (sid_rank, item_rank): (Option<usize>, Option<usize>)) {
        self.by_sid.add(cutoffs, sid_rank);
        self.by_item.add(cutoffs, item_rank);
    }
}

/// What a pass through the requests has seen.
struct Pass<'a> {
    cutoffs: &'a [usize],
    all: Both,
    segments: BTreeMap<String, Both>,
    spread: Spread,
    failed: u64,
    unknown_targets: u64,
    unknown_items: usize,
    without_target: u64,
}

impl Pass<'_> {
    fn add(&mut self, answered: &Answered) {
        let Some(line) = &answered.line else {
            return self.fail(answered, None);
        };
        let Some(target) = line.target() else {
            self.without_target += 1;
            return;
        };
        self.spread.add_history(line.history().iter().map(String::as_str));
        let Ok(answer) = &answered.answer else {
            return self.fail(answered, line.segment());
        };
        // What the catalog does not have cannot be found: a miss, and one to know of.
        let number = answer.snapshot.find(target);
        self.unknown_targets += u64::from(number.is_none());
        self.unknown_items += answer.unknown_items.history.count;
        self.spread.add_answer(self.cutoffs, answer, target);
        self.count(number.map_or((None, None), |number| ranks(answer, number)), line.segment());
    }

    /// A request that failed found nothing: it counts.
    fn fail(&mut self, answered: &Answered, segment: Option<&str>) {
        if let Err(error) = &answered.answer {
            say(&format!("line {}: {error}", answered.line_number));
        }
        self.failed += 1;
        self.count((None, None), segment);
    }

    fn count(&mut self, ranks: (Option<usize>, Option<usize>), segment: Option<&str>) {
        self.all.add(self.cutoffs, ranks);
        if let Some(segment) = segment {
            let of_segment = self.segments.entry(segment.to_string());
            of_segment.or_insert_with(|| Both::new(self.cutoffs)).add(self.cutoffs, ranks);
        }
    }
}

fn evaluate(
    recommender: &Recommender,
    path: &Path,
    defaults: &RequestDefaults,
    cutoffs: &[usize],
) -> Result<Report> {
    let start = std::time::Instant::now();
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
    let mut pass = Pass {
        cutoffs,
        all: Both::new(cutoffs),
        segments: BTreeMap::new(),
        spread: Spread::default(),
        failed: 0,
        unknown_targets: 0,
        unknown_items: 0,
        without_target: 0,
    };
    answer_file(recommender, Requests::open(path)?, defaults, check, |delivery| {
        if let Delivery::Answer(answered) = delivery {
            pass.add(&answered);
        }
        Ok(())
    })?;
    let requests = pass.all.by_item.requests();
    if requests == 0 {
        let reason = match pass.without_target {
            0 => "there are no requests".into(),
            count => format!("none of {count} requests has a \"target\", the item taken next"),
        };
        return Err(Error::RequestsFile { path: path.to_path_buf(), reason });
    }
    let of_segment = |(name, both): (String, Both)| {
        let Both { by_sid, by_item } = both;
        let requests = by_item.requests();
        let (by_sid, by_item) = (by_sid.metrics(cutoffs), by_item.metrics(cutoffs));
        (name, SegmentReport { requests, by_sid, by_item })
    };
    Ok(Report {
        requests,
        failed: pass.failed,
        unknown_targets: pass.unknown_targets,
        unknown_items: pass.unknown_items,
        without_target: pass.without_target,
        beams: (recommender.kind() == ModelKind::Writer).then_some(defaults.beams),
        by_sid: pass.all.by_sid.metrics(cutoffs),
        by_item: pass.all.by_item.metrics(cutoffs),
        spread: pass.spread.report(cutoffs, recommender.catalog().snapshot().num_items()),
        segments: pass.segments.into_iter().map(of_segment).collect(),
        seconds: start.elapsed().as_secs_f64(),
    })
}

/// How wide the names of rows are.
const NAME: usize = 20;

fn to_text(report: &Report, cutoffs: &[usize]) -> String {
    let beams = report.beams.map(|beams| format!(", beam width {beams}")).unwrap_or_default();
    let mut text = format!(
        "{} requests, {} failed{beams}, {:.1} s\n",
        report.requests, report.failed, report.seconds
    );
    for (count, what) in [
        (report.without_target, "lines have no \"target\" and were left out"),
        (report.unknown_targets, "targets are not in the catalog and count as not found"),
        (
            report.unknown_items as u64,
            "items of histories are not in the catalog and were left out",
        ),
    ] {
        if count > 0 {
            text += &format!("{count} {what}\n");
        }
    }
    let columns = |name: &str| {
        let columns = cutoffs.iter().map(|cutoff| format!("{:>12}", format!("{name}@{cutoff}")));
        columns.collect::<String>()
    };
    let numbers =
        |values: &[f64]| values.iter().map(|value| format!("{value:>12.4}")).collect::<String>();
    let row = |name: &str, metrics: &Metrics| {
        let name: String = printable(name).chars().take(NAME).collect();
        format!("{name:<NAME$}{}{}\n", numbers(&metrics.recall), numbers(&metrics.ndcg))
    };
    text += &format!("{:<NAME$}{}{}\n", "", columns("Recall"), columns("NDCG"));
    text += &row("by semantic ID", &report.by_sid);
    text += &row("by item", &report.by_item);
    for (name, segment) in &report.segments {
        text += &row(&format!("  {name} ({})", segment.requests), &segment.by_item);
    }
    let spread = &report.spread;
    text += &format!("{:<NAME$}{}\n", "coverage", numbers(&spread.coverage));
    text += &format!("{:<NAME$}{}", "popularity", numbers(&spread.popularity));
    text + &format!("   (of the targets: {:.4})", spread.target_popularity)
}
