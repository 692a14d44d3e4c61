//! `sidereal recommend`: histories in, items out.

use std::io::{BufWriter, IsTerminal, Write};
use std::path::{Path, PathBuf};

use clap::{Args, ValueEnum};
use comfy_table::{CellAlignment, ContentArrangement, Table, presets};
use sidereal::catalog::Snapshot;
use sidereal::wire::{AnswerLine, ErrorLine, RequestDefaults, RequestLine};
use sidereal::{Answer, Error, ReadToken, Recommendation, Request, Result, UnknownByField};

use super::arguments::{
    LeniencyArguments, ModelArguments, NormalizationName, Outcome, SearchArguments,
    refuse_same_file, write_error,
};
use super::output::create_stream;
use super::requests::{Answered, Delivery, Requests, answer_file};

#[derive(Args)]
#[command(after_help = "\
A request line:  {\"id\": \"u1\", \"history\": [\"17\", \"4\"], \"exclude\": [\"4\"], \"beams\": 50, \"top_k\": 10}
                 or, instead of \"history\", \"tokens\": [...], the model's input as it is;
                 \"only\": [\"9\", \"12\", ...] for these items alone,
                 further: \"filter\": \"tag:garden & !tag:adult\", \"groups\": [\"tag:a\", ...] for the best of each,
                 \"normalize\", \"constraint\", \"temperature\", \"shared_sid\": \"all\"|\"first\",
                 \"per_sid\": 2, for so many items of one semantic ID at most,
                 \"min_snapshot\": 7, for no older state of the catalog,
                 \"beams\": [16, 64, 128] for a width by level, \"log_probs\": true,
                 \"seed\": a number, to draw the beams by chance, \"titles\": false, \"timings\": true,
                 \"forced\": {\"tokens\": [9], \"counted\": true}, tokens that stand before the codes,
                 \"read\": [\"Yes\", \"No\"], for the log-probabilities of these tokens instead of items,
                 \"user\": a name, to find the context of an earlier request again
An answer line:  {\"id\": \"u1\", \"items\": [{\"item\": \"9\", \"sid\": [3, 250, 7], \"score\": -2.31}], ...}
A bad line is answered in its place with {\"id\": ..., \"error\": {\"code\": ..., \"message\": ...}}.

Examples:
  sidereal recommend --model models/industrial --requests models/industrial/users.jsonl --top-k 5
  sidereal recommend --model DIR --catalog items.sidereal --requests - --beams 128 --output answers.jsonl
  echo '{\"history\": [\"17\", \"4\"]}' | sidereal recommend --model DIR --requests - --format table")]
pub struct Arguments {
    #[command(flatten)]
    model: ModelArguments,
    /// Requests, one JSON object a line; - for the standard input
    #[arg(long, value_name = "FILE")]
    requests: PathBuf,
    #[command(flatten)]
    search: SearchArguments,
    /// Items of an answer at most
    #[arg(long, default_value_t = 10, value_name = "K", value_parser = clap::value_parser!(u32).range(1..))]
    top_k: u32,
    #[command(flatten)]
    answers: AnswerArguments,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Format {
    /// For people, with titles where the catalog has them
    Table,
    /// For programs, one JSON object a line
    Jsonl,
}

#[derive(Args)]
#[command(after_help = "\
A request line:  {\"id\": \"u1\", \"history\": [\"17\", \"4\"], \"candidates\": [\"9\", \"12\", \"30\"]}
An answer line:  {\"id\": \"u1\", \"items\": [{\"item\": \"9\", \"sid\": [3, 250, 7], \"score\": -2.31}], ...}
All candidates come back, best first; those that are not available are left out.

Example:
  echo '{\"history\": [\"17\", \"4\"], \"candidates\": [\"9\", \"12\"]}' | sidereal rank --model DIR --requests -")]
pub struct RankArguments {
    #[command(flatten)]
    model: ModelArguments,
    /// Requests with candidates, one JSON object a line; - for the standard input
    #[arg(long, value_name = "FILE")]
    requests: PathBuf,
    /// What scores are normalised over; by default what the model's sidereal.json says, else vocabulary
    #[arg(long)]
    normalize: Option<NormalizationName>,
    #[command(flatten)]
    leniency: LeniencyArguments,
    #[command(flatten)]
    answers: AnswerArguments,
}

#[derive(Args)]
struct AnswerArguments {
    /// Where answers go; by default the standard output
    #[arg(long, value_name = "FILE")]
    output: Option<PathBuf>,
    /// How answers look; by default a table on a terminal and JSON lines elsewhere
    #[arg(long)]
    format: Option<Format>,
}

pub fn run(arguments: &Arguments) -> Result<Outcome> {
    let mut defaults = arguments.search.defaults(arguments.top_k as usize);
    defaults.titles = true;
    answer(&arguments.model, &arguments.requests, &arguments.answers, &defaults, Ok)
}

pub fn run_rank(arguments: &RankArguments) -> Result<Outcome> {
    let mut defaults = RequestDefaults::default();
    defaults.normalization = arguments.normalize.map(NormalizationName::normalization);
    arguments.leniency.apply(&mut defaults);
    defaults.titles = true;
    let check = |request: Request| match request.candidates.is_empty() {
        true => {
            let reason = "name the items to score".into();
            Err(Error::InvalidField { field: "candidates", reason })
        }
        false => Ok(request),
    };
    answer(&arguments.model, &arguments.requests, &arguments.answers, &defaults, check)
}

fn answer(
    model: &ModelArguments,
    requests: &Path,
    arguments: &AnswerArguments,
    defaults: &RequestDefaults,
    check: impl Fn(Request) -> Result<Request>,
) -> Result<Outcome> {
    refuse_same_file("--output", arguments.output.as_deref(), requests)?;
    let recommender = model.open()?;
    let requests = Requests::open(requests)?;
    let output = arguments.output.as_deref();
    let failed = write_error(output);
    let mut writer: Box<dyn Write> = match output {
        Some(path) => Box::new(BufWriter::new(create_stream(path).map_err(&failed)?)),
        None => Box::new(BufWriter::new(std::io::stdout())),
    };
    let is_seen = output.is_none() && std::io::stdout().is_terminal();
    let format = arguments.format.unwrap_or(if is_seen { Format::Table } else { Format::Jsonl });
    let mut outcome = Outcome::Done;
    answer_file(&recommender, requests, defaults, check, |delivery| {
        let Delivery::Answer(answered) = delivery else { return writer.flush().map_err(&failed) };
        if answered.answer.is_err() {
            outcome = Outcome::SomeFailed;
        }
        let written = match format {
            Format::Table => write_table(&mut writer, &recommender.catalog().snapshot(), &answered),
            Format::Jsonl => write_line(&mut writer, &answered),
        };
        written.map_err(&failed)
    })?;
    writer.flush().map_err(&failed)?;
    Ok(outcome)
}

/// Each list of an answer with its filter; one list without one where there are no groups, none
/// where named tokens alone were read.
fn lists(answer: &Answer) -> Vec<(Option<&str>, &[Recommendation])> {
    match &answer.groups[..] {
        [] if answer.items.is_empty() && !answer.read.is_empty() => Vec::new(),
        [] => vec![(None, &answer.items)],
        groups => groups.iter().map(|group| (Some(&*group.filter), &*group.items)).collect(),
    }
}

fn write_line(writer: &mut dyn Write, answered: &Answered) -> std::io::Result<()> {
    let Answered { id, line_number, .. } = answered;
    match &answered.answer {
        Ok(answer) => serde_json::to_writer(&mut *writer, &AnswerLine::new(id, answer))?,
        Err(error) => {
            serde_json::to_writer(&mut *writer, &ErrorLine::new(id, *line_number, error))?
        }
    }
    writeln!(writer)
}

fn write_table(
    writer: &mut dyn Write,
    catalog: &Snapshot,
    answered: &Answered,
) -> std::io::Result<()> {
    let name = match &answered.id {
        serde_json::Value::Null => format!("line {}", answered.line_number),
        serde_json::Value::String(text) => text.clone(),
        other => other.to_string(),
    };
    writeln!(writer, "{name}")?;
    let line = answered.line.as_ref();
    for item in line.map(RequestLine::history).unwrap_or_default() {
        writeln!(writer, "  had  {}", label(catalog, item))?;
    }
    if let Some(target) = line.and_then(RequestLine::target) {
        writeln!(writer, "  then {}", label(catalog, target))?;
    }
    match &answered.answer {
        Ok(answer) => {
            for line in unknown_items(answer) {
                writeln!(writer, "  {line}")?;
            }
            if !answer.read.is_empty() {
                writeln!(writer, "{}\n", read_table(&answer.read))?;
            }
            for (filter, items) in lists(answer) {
                if let Some(filter) = filter {
                    writeln!(writer, "  {filter}")?;
                }
                writeln!(writer, "{}\n", table(items, line))?;
            }
            Ok(())
        }
        Err(error) => writeln!(writer, "  error: {error}\n"),
    }
}

/// A line for each field that named items which the catalog does not have.
fn unknown_items(answer: &Answer) -> impl Iterator<Item = String> + '_ {
    let UnknownByField { history, candidates, only, .. } = &answer.unknown_items;
    let fields = [("history", history), ("candidates", candidates), ("only", only)];
    fields.into_iter().filter(|(_, unknown)| unknown.count > 0).map(|(field, unknown)| {
        let more = if unknown.names.len() < unknown.count { ", ..." } else { "" };
        let (count, names) = (unknown.count, unknown.names.join(", "));
        format!("left out {count} of \"{field}\" that the catalog does not have: {names}{more}")
    })
}

fn label(catalog: &Snapshot, item: &str) -> String {
    let title = catalog.find(item).and_then(|item| catalog.title(item));
    match title {
        Some(title) => format!("{item}: {title}"),
        None => item.to_string(),
    }
}

/// How wide a table is where no terminal says so.
const COLUMNS_WITHOUT_TERMINAL: u16 = 120;

fn empty_table() -> Table {
    let mut table = Table::new();
    table.load_preset(presets::UTF8_BORDERS_ONLY);
    table.set_content_arrangement(ContentArrangement::Dynamic);
    if !std::io::stdout().is_terminal() {
        table.set_width(COLUMNS_WITHOUT_TERMINAL);
    }
    table
}

/// Named tokens, in the request's order.
fn read_table(tokens: &[ReadToken]) -> Table {
    let mut table = empty_table();
    table.set_header(["token", "text", "log-probability", "probability"]);
    for ReadToken { token, text, log_prob, .. } in tokens {
        table.add_row([
            token.to_string(),
            text.clone().unwrap_or_default(),
            format!("{log_prob:.3}"),
            format!("{:.2} %", log_prob.exp() * 100.0),
        ]);
    }
    align_right(&mut table, &[0, 2, 3]);
    table
}

fn align_right(table: &mut Table, columns: &[usize]) {
    for &column in columns {
        if let Some(column) = table.column_mut(column) {
            column.set_cell_alignment(CellAlignment::Right);
        }
    }
}

fn table(items: &[Recommendation], line: Option<&RequestLine>) -> Table {
    let mut table = empty_table();
    table.set_header(["", "item", "title", "semantic ID", "score", "probability"]);
    let target = line.and_then(RequestLine::target);
    for (rank, found) in items.iter().enumerate() {
        let item = &*found.item;
        let mark = if target == Some(item) { " ◀ taken next" } else { "" };
        table.add_row([
            format!("{}", rank + 1),
            item.to_string(),
            format!("{}{mark}", found.title.as_deref().unwrap_or("")),
            format!("{:?}", found.sid.codes()),
            format!("{:.3}", found.score),
            format!("{:.2} %", found.score.exp() * 100.0),
        ]);
    }
    align_right(&mut table, &[0, 4, 5]);
    table
}
