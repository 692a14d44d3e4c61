//! `sidereal recommend`: histories in, items out.

use std::io::{BufWriter, IsTerminal, Write};
use std::path::{Path, PathBuf};

use clap::{Args, ValueEnum};
use comfy_table::{CellAlignment, ContentArrangement, Table, presets};
use sidereal::catalog::Snapshot;
use sidereal::wire::{AnswerLine, ErrorLine, RequestDefaults, RequestLine};
use sidereal::{
    Answer, Error, ModelKind, ReadToken, Recommendation, Recommender, Request, Result,
    UnknownByField,
};

use super::arguments::{
    LeniencyArguments, ModelArguments, NormalizationName, Outcome, SearchArguments,
    refuse_same_file, write_error,
};
use super::output::create_stream;
use super::requests::{Answered, Delivery, Requests, answer_file};
use super::terminal::printable;

#[derive(Args)]
#[command(after_help = "\
A request line, of which all but the input may be left out:
  {\"id\": \"u1\", \"history\": [\"17\", \"4\"], \"beams\": 50, \"top_k\": 10}
The input:
  \"history\"           items, the oldest first; or else
  \"tokens\"            the model's input as it is; \"text\" or \"messages\" with a
                      tokenizer
Which items may come back:
  \"exclude\"           not these;   \"exclude_history\": true, none of the history
  \"only\"              these alone
  \"filter\"            \"tag:garden & !tag:adult\"
  \"groups\"            [\"tag:a\", \"tag:b\"], the best of each
  \"per_sid\"           so many of one semantic ID;   \"shared_sid\": \"all\"|\"first\"
How they are found:
  \"beams\"             a width, or one for each level, as [16, 64, 128]
  \"normalize\", \"constraint\", \"temperature\"
  \"seed\"              a number, to draw the beams by chance
  \"forced\"            {\"tokens\": [9], \"counted\": true}, tokens before the codes
  \"read\"              [\"Yes\", \"No\"], log-probabilities of tokens, not items
What comes with them:
  \"log_probs\", \"titles\", \"timings\": true or false
And:
  \"user\"              a name, to find the context of an earlier request again
  \"min_snapshot\"      for no older state of the catalog

An answer line:
  {\"id\": \"u1\", \"items\": [{\"item\": \"9\", \"sid\": [3, 250], \"score\": -2.3}], ...}
A line that failed:
  {\"id\": \"u1\", \"error\": {\"code\": \"...\", \"message\": \"...\"}}

Examples:
  sidereal recommend --model DIR --requests users.jsonl --exclude-history
  sidereal recommend --model DIR --requests - --beams 128 --output out.jsonl
  echo '{\"history\": [\"17\"]}' | sidereal recommend --model DIR --requests -")]
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
A request line:
  {\"id\": \"u1\", \"history\": [\"17\", \"4\"], \"candidates\": [\"9\", \"12\", \"30\"]}
An answer line:
  {\"id\": \"u1\", \"items\": [{\"item\": \"9\", \"sid\": [3, 250], \"score\": -2.3}], ...}
All candidates come back, best first; those that are not available are left
out. Networks that give vectors score by products, not log-probabilities.
Networks that score candidates read more, and have one score a task:
  {\"history\": [{\"item\": \"17\", \"time\": 1700000000, \"action\": 3}],
   \"candidates\": [\"9\"], \"time\": 1700000100, \"features\": {\"user_id\": 7}}

Examples:
  sidereal rank --model DIR --requests requests.jsonl
  sidereal rank --model DIR --requests - --output answers.jsonl")]
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
pub(super) struct AnswerArguments {
    /// Where answers go; by default, and as -, the standard output
    #[arg(long, value_name = "FILE")]
    output: Option<PathBuf>,
    /// How answers look; by default a table on a terminal and JSON lines elsewhere
    #[arg(long)]
    format: Option<Format>,
}

pub fn run(arguments: &Arguments) -> Result<Outcome> {
    let mut defaults = arguments.search.defaults(arguments.top_k as usize);
    defaults.titles = true;
    let recommender = arguments.model.open_kind(ModelKind::Writer)?;
    defaults.check(recommender.catalog().snapshot().num_levels())?;
    answer(&recommender, &arguments.requests, &arguments.answers, &defaults, Ok)
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
    let recommender = arguments.model.open()?;
    answer(&recommender, &arguments.requests, &arguments.answers, &defaults, check)
}

pub(super) fn answer(
    recommender: &Recommender,
    requests: &Path,
    arguments: &AnswerArguments,
    defaults: &RequestDefaults,
    check: impl Fn(Request) -> Result<Request>,
) -> Result<Outcome> {
    let output = arguments.output.as_deref().filter(|path| path.as_os_str() != "-");
    refuse_same_file("--output", output, requests)?;
    let requests = Requests::open(requests)?;
    let failed = write_error(output);
    let mut writer: Box<dyn Write> = match output {
        Some(path) => Box::new(BufWriter::new(create_stream(path).map_err(&failed)?)),
        None => Box::new(BufWriter::new(std::io::stdout())),
    };
    let is_seen = output.is_none() && std::io::stdout().is_terminal();
    let format = arguments.format.unwrap_or(if is_seen { Format::Table } else { Format::Jsonl });
    let mut outcome = Outcome::Done;
    answer_file(recommender, requests, defaults, check, |delivery| {
        let Delivery::Answer(answered) = delivery else { return writer.flush().map_err(&failed) };
        if answered.answer.is_err() {
            outcome = Outcome::SomeFailed;
        }
        let written = match format {
            Format::Table => {
                let has_probabilities = recommender.kind() == ModelKind::Writer;
                let catalog = recommender.catalog().snapshot();
                write_table(&mut writer, &catalog, &answered, has_probabilities)
            }
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
    has_probabilities: bool,
) -> std::io::Result<()> {
    let name = match &answered.id {
        serde_json::Value::Null => format!("line {}", answered.line_number),
        serde_json::Value::String(text) => text.clone(),
        other => other.to_string(),
    };
    writeln!(writer, "{}", printable(&name))?;
    let line = answered.line.as_ref();
    for item in line.map(RequestLine::history).unwrap_or_default() {
        writeln!(writer, "  had  {}", label(catalog, item))?;
    }
    if let Some(target) = line.and_then(RequestLine::target) {
        let found = answered.answer.as_ref().ok().map(|answer| whether_found(answer, target));
        writeln!(
            writer,
            "  then {} (held out{})",
            label(catalog, target),
            found.unwrap_or_default()
        )?;
    }
    match &answered.answer {
        Ok(answer) => {
            for line in unknown_items(answer) {
                writeln!(writer, "  {}", printable(&line))?;
            }
            if !answer.read.is_empty() {
                writeln!(writer, "{}\n", read_table(&answer.read))?;
            }
            for (filter, items) in lists(answer) {
                if let Some(filter) = filter {
                    writeln!(writer, "  {}", printable(filter))?;
                }
                writeln!(writer, "{}", table(items, line, has_probabilities))?;
                // Items with a vector each are told apart, whatever their semantic IDs are.
                let about_shared = has_probabilities.then(|| about_shared(items));
                writeln!(writer, "{}", about_shared.unwrap_or_default())?;
            }
            Ok(())
        }
        Err(error) => writeln!(writer, "  error: {}\n", printable(&error.to_string())),
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
        Some(title) => printable(&format!("{item}: {title}")).into_owned(),
        None => printable(item).into_owned(),
    }
}

/// Where the item that the user took next stands in an answer that has one list.
fn whether_found(answer: &Answer, target: &str) -> String {
    let count = answer.items.len();
    let rank = answer.items.iter().position(|found| &*found.item == target);
    match rank {
        _ if !answer.groups.is_empty() || !answer.read.is_empty() => String::new(),
        Some(rank) => format!("; found, rank {} of {count}", rank + 1),
        None => format!("; not among these {count}"),
    }
}

/// A line about items that look like the same one twice; empty where there are none.
fn about_shared(items: &[Recommendation]) -> String {
    let sharing = items.chunk_by(|one, other| one.sid == other.sid).filter(|items| items.len() > 1);
    match sharing.map(<[Recommendation]>::len).sum::<usize>() {
        0 => String::new(),
        count => format!(
            "  {count} of them share a semantic ID with another: the model tells them apart by nothing, and \
             their scores are the same (--per-sid 1 shows one of each)\n"
        ),
    }
}

/// A probability with two digits that say something, however small it is.
fn percent(probability: f64) -> String {
    match probability * 100.0 {
        percent if percent >= 0.1 || percent == 0.0 => format!("{percent:.2} %"),
        percent if percent >= 1e-4 => {
            let digits = 1 - percent.log10().floor() as i32;
            format!("{percent:.*} %", digits.max(0) as usize)
        }
        percent => format!("{percent:.1e} %"),
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
            printable(text.as_deref().unwrap_or_default()).into_owned(),
            format!("{log_prob:.3}"),
            percent(f64::from(*log_prob).exp()),
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

fn table(items: &[Recommendation], line: Option<&RequestLine>, has_probabilities: bool) -> Table {
    let mut table = empty_table();
    let is_ranking = line.and_then(RequestLine::candidates).is_some_and(|items| !items.is_empty());
    let is_ranking = is_ranking && has_probabilities;
    // A network that scores candidates has a score a task.
    let tasks = items.first().map_or(&[][..], |item| &item.tasks[..]);
    let mut header = vec!["", "item", "title", "semantic ID"];
    header.extend(tasks.is_empty().then_some("score"));
    header.extend(tasks.iter().map(|task| &*task.task));
    header.extend(has_probabilities.then_some("probability"));
    // Of thousands of items each has little; what is asked is how these compare.
    header.extend(is_ranking.then_some("among these"));
    table.set_header(header);
    let probability = |item: &Recommendation| f64::from(item.score).exp();
    let best = items.iter().map(|item| f64::from(item.score)).fold(f64::NEG_INFINITY, f64::max);
    let relative = |item: &Recommendation| (f64::from(item.score) - best).exp();
    let all: f64 = items.iter().map(relative).sum();
    let target = line.and_then(RequestLine::target);
    for (rank, found) in items.iter().enumerate() {
        let item = &*found.item;
        let mark = if target == Some(item) { " ◀ taken next" } else { "" };
        let mut row = vec![
            format!("{}", rank + 1),
            printable(item).into_owned(),
            format!("{}{mark}", printable(found.title.as_deref().unwrap_or(""))),
            format!("{:?}", found.sid.codes()),
        ];
        row.extend(found.tasks.is_empty().then(|| format!("{:.3}", found.score)));
        row.extend(found.tasks.iter().map(|task| format!("{:.4}", task.score)));
        row.extend(has_probabilities.then(|| percent(probability(found))));
        row.extend(is_ranking.then(|| percent(relative(found) / all)));
        table.add_row(row);
    }
    let numbers: Vec<usize> = [0].into_iter().chain(4..6 + tasks.len().max(1)).collect();
    align_right(&mut table, &numbers);
    table
}
