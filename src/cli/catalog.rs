//! `sidereal catalog`: build, inspect, check, change; fit codebooks and assign semantic IDs.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};

use clap::{Args, Subcommand, ValueEnum};
use serde::Serialize;
use sidereal::catalog::sid::MAX_LEVELS;
use sidereal::catalog::{Catalog, CatalogBuilder, Change, Snapshot, Watermark, change_log, items};
use sidereal::lines::Lines;
use sidereal::quantizer::{Collision, FitOptions, FitRound, Quantizer};
use sidereal::{CatalogWriter, Error, Result, WriterOptions};

use super::arguments::{Outcome, refuse_same_file, say, write_error};
use super::check;
use super::embeddings::matrix;
use super::output::OutputFile;
use super::requests::{count_bar, progress_bar, spinner};

#[derive(Subcommand)]
pub enum Command {
    /// Compile a file of items into one file
    Build(Build),
    /// Print what a catalog holds
    Inspect(Inspect),
    /// Put, delete and tag items, and set their availability
    Change(Changes),
    /// Verify a catalog and its log of changes, and save what can be read of a damaged one
    Check(check::Arguments),
    /// Fit the codebooks of a residual quantiser to embeddings
    Fit(Fit),
    /// Assign semantic IDs to items by their embeddings
    Assign(Assign),
}

#[derive(Args)]
#[command(after_help = "\
Items are JSON lines,
  {\"item\": \"17\", \"sid\": [3, 250, 7], \"title\": \"...\", \"tags\": [\"new\"]}
or, where the name ends in .json, the field's index,
  {\"17\": [\"<a_3>\", \"<b_250>\", \"<c_7>\"], ...}
Several items may share a semantic ID: they come by \"weight\", the largest
first, then by name. An item with \"available\": false may stand in histories
and is never recommended.

Examples:
  sidereal catalog build --items items.jsonl --output items.sidereal
  sidereal catalog build --items i.jsonl --output i.sidereal --ignore price")]
pub struct Build {
    /// File of items
    #[arg(long, value_name = "FILE")]
    items: PathBuf,
    /// Where the catalog goes; one that is there is replaced by rename. Do so too: mv, never cp, over
    /// a catalog that is in use
    #[arg(long, value_name = "FILE")]
    output: PathBuf,
    /// How far a feed had been applied to the items, as source/partition@offset; may be repeated. Changes
    /// of an existing catalog that come later are kept
    #[arg(long, value_name = "MARK")]
    watermark: Vec<Watermark>,
    /// Fields of items that are to have no effect, as price,brand; others than the documented ones are
    /// errors
    #[arg(long, value_name = "FIELD,...", value_delimiter = ',')]
    ignore: Vec<String>,
}

#[derive(Args)]
#[command(after_help = "\
Example:
  sidereal catalog inspect items.sidereal --json")]
pub struct Inspect {
    /// Catalog, or file of items
    catalog: PathBuf,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

/// Tags that are listed for people.
const TAGS_SHOWN: usize = 20;

#[derive(Args)]
#[command(after_help = "\
Changes are JSON lines, each one of
  {\"put\": {\"item\": \"17\", \"sid\": [3, 250, 7], \"title\": \"...\", \"tags\": [\"new\"]}}
  {\"delete\": {\"item\": \"17\"}}
  {\"availability\": {\"item\": \"17\", \"available\": false}}
  {\"tag\": {\"item\": \"17\", \"add\": [\"sale\"], \"remove\": [\"new\"]}}
  {\"weight\": {\"item\": \"17\", \"weight\": 2.5}}
A change that says what already is changes nothing. They go to a log beside
the catalog, which everything that opens the catalog reads.
Exit code 0 says that all changes are applied and logged; 1 that they are, and
--compact failed; 2 that none is applied, or, where the message says so, that
the last ones may be.

Example:
  sidereal catalog change items.sidereal --changes today.jsonl --compact")]
pub struct Changes {
    /// Compiled catalog
    catalog: PathBuf,
    /// Changes, one JSON object a line
    #[arg(long, value_name = "FILE")]
    changes: PathBuf,
    /// Compile the catalog anew when all is applied, so that the log begins again
    #[arg(long)]
    compact: bool,
    /// Where the changes end in their feed, as source/partition@offset; changes that are applied already
    /// are skipped
    #[arg(long, value_name = "MARK")]
    watermark: Option<Watermark>,
    /// Fields of items that are to have no effect, as price,brand
    #[arg(long, value_name = "FIELD,...", value_delimiter = ',')]
    ignore: Vec<String>,
}

#[derive(Args)]
#[command(after_help = "\
The embeddings are a safetensors file or NumPy's .npy with one matrix, a row an
item. The codebooks come out as codebooks.0, codebooks.1 and so on. Equal seeds
give equal codebooks.

Example:
  sidereal catalog fit --embeddings items.npy --output codebooks.safetensors")]
pub struct Fit {
    /// Embeddings, [items, numbers]
    #[arg(long, value_name = "FILE")]
    embeddings: PathBuf,
    /// Levels of a semantic ID
    #[arg(long, default_value_t = FitOptions::default().levels)]
    levels: usize,
    /// Codes of a level
    #[arg(long, default_value_t = FitOptions::default().codes)]
    codes: usize,
    /// Of the random start
    #[arg(long, default_value_t = FitOptions::default().seed)]
    seed: u64,
    /// Rounds of k-means at most, for each level
    #[arg(long, default_value_t = FitOptions::default().max_rounds as u64, value_parser = clap::value_parser!(u64).range(1..=100_000))]
    rounds: u64,
    /// Where the codebooks go
    #[arg(long, value_name = "FILE")]
    output: PathBuf,
}

#[derive(Args)]
#[command(after_help = "\
The codebooks are a safetensors file: fitted here, or an RQ-VAE as LC-Rec and
MiniOneRec train it. Items come out as JSON lines, ready for `sidereal catalog
build`.

Example:
  sidereal catalog assign --embeddings E --codebooks C --output items.jsonl")]
pub struct Assign {
    /// Embeddings, [items, numbers]
    #[arg(long, value_name = "FILE")]
    embeddings: PathBuf,
    /// Names of the items, one a line; by default their row's number
    #[arg(long, value_name = "FILE")]
    names: Option<PathBuf>,
    /// Titles of the items, one a line
    #[arg(long, value_name = "FILE")]
    titles: Option<PathBuf>,
    /// Codebooks of a residual quantiser
    #[arg(long, value_name = "FILE")]
    codebooks: PathBuf,
    /// What happens where items get the same codes
    #[arg(long, default_value = "share")]
    collisions: CollisionName,
    /// Where the items go
    #[arg(long, value_name = "FILE")]
    output: PathBuf,
}

#[derive(Clone, Copy, ValueEnum)]
enum CollisionName {
    /// They share the semantic ID
    Share,
    /// A last level tells them apart
    Append,
}

/// Changes that are applied together.
const CHANGES_PER_BATCH: usize = 10_000;

pub fn run(command: &Command) -> Result<Outcome> {
    match command {
        Command::Check(arguments) => return check::run(arguments),
        Command::Build(arguments) => build(arguments)?,
        Command::Inspect(arguments) => inspect(arguments)?,
        Command::Change(arguments) => return change(arguments),
        Command::Fit(arguments) => fit(arguments)?,
        Command::Assign(arguments) => assign(arguments)?,
    }
    Ok(Outcome::Done)
}

/// [`Outcome::SomeFailed`] says that the changes are applied and were not compiled in.
fn change(arguments: &Changes) -> Result<Outcome> {
    let options = WriterOptions::default().with_compact_at(usize::MAX);
    let writer = CatalogWriter::open(&arguments.catalog, &options)?;
    let catalog = arguments.catalog.display();
    let mark = arguments.watermark.as_ref();
    if let Some(mark) = mark.filter(|mark| writer.catalog().snapshot().watermarks().covers(mark)) {
        say(&format!("{catalog}: {mark} is applied already; nothing was changed"));
        return Ok(Outcome::Done);
    }
    // Every line is checked before the first is applied: a file with a bad line changes nothing.
    let mut changes = Vec::new();
    let bytes = std::fs::metadata(&arguments.changes).ok().map(|metadata| metadata.len());
    let progress = progress_bar(bytes, "reading changes");
    let take = |change| {
        writer.catalog().check_change(&change)?;
        changes.push(change);
        Ok(())
    };
    items::read_changes(&arguments.changes, &arguments.ignore, take, |read| {
        progress.set_position(read)
    })?;
    progress.finish_and_clear();
    let without_effect = apply(&writer, &changes, mark)?;
    let mut outcome = Outcome::Done;
    if arguments.compact {
        let spinner = spinner("compiling the catalog anew");
        let compacted = writer.compact();
        spinner.finish_and_clear();
        if let Err(error) = compacted {
            say(&format!(
                "warning: all changes are applied and logged, and need not be sent again; they could \
                 not be compiled in: {error}"
            ));
            outcome = Outcome::SomeFailed;
        }
    }
    let snapshot = writer.catalog().snapshot();
    say(&format!(
        "{catalog}: {} changes applied ({without_effect} named items that were not known), now {} \
         items, snapshot {}",
        changes.len(),
        snapshot.num_items(),
        snapshot.number(),
    ));
    Ok(outcome)
}

/// Applies changes in batches, the last one with the watermark, and forces them to the disk. Returns
/// how many named an item that was not known.
fn apply(writer: &CatalogWriter, changes: &[Change], mark: Option<&Watermark>) -> Result<usize> {
    let progress = count_bar(changes.len() as u64, "applying changes");
    let (mut applied, mut without_effect) = (0, 0);
    let apply_all = || {
        for batch in changes.chunks(CHANGES_PER_BATCH) {
            let before = writer.catalog().snapshot();
            let is_unknown = |change: &&Change| before.is_without_effect(change);
            let num_unknown = batch.iter().filter(is_unknown).count();
            match mark.filter(|_| applied + batch.len() == changes.len()) {
                Some(mark) => drop(writer.apply_from(mark, batch)?),
                None => drop(writer.apply(batch)?),
            }
            (applied, without_effect) = (applied + batch.len(), without_effect + num_unknown);
            progress.inc(batch.len() as u64);
        }
        if let (Some(mark), []) = (mark, changes) {
            writer.apply_from(mark, &[])?;
        }
        writer.sync()
    };
    let outcome: Result<()> = { apply_all }();
    progress.finish_and_clear();
    if outcome.is_err() && applied > 0 {
        say(&format!("the first {applied} of {} changes are applied and logged", changes.len()));
    }
    outcome.map(|()| without_effect)
}

fn fit(arguments: &Fit) -> Result<()> {
    refuse_same_file("--output", Some(&arguments.output), &arguments.embeddings)?;
    let (embeddings, dim) = matrix(&arguments.embeddings)?;
    let options = FitOptions {
        levels: arguments.levels,
        codes: arguments.codes,
        seed: arguments.seed,
        max_rounds: arguments.rounds as usize,
    };
    let spinner = spinner("fitting");
    let mut errors = vec![0.0; arguments.levels.min(MAX_LEVELS)];
    let quantizer = Quantizer::fit(&embeddings, dim, &options, |round| {
        let FitRound { level, round, error } = round;
        errors[level] = error;
        spinner.set_message(format!("level {level}, round {round}: mean squared error {error:.4}"));
    })?;
    let failed = write_error(Some(&arguments.output));
    let mut output = OutputFile::create(&arguments.output).map_err(&failed)?;
    output.write_all(&quantizer.to_bytes()?).map_err(&failed)?;
    output.finish().map_err(&failed)?;
    spinner.finish_and_clear();
    let errors: Vec<String> = errors.iter().map(|error| format!("{error:.4}")).collect();
    say(&format!(
        "{}: {} levels; mean squared error after each: {}",
        arguments.output.display(),
        quantizer.num_levels(),
        errors.join(", ")
    ));
    Ok(())
}

/// The lines of a file, each a name or a title.
fn read_lines(path: &Path) -> Result<Vec<String>> {
    let io = |error| Error::io(path, error);
    let mut lines = Lines::new(File::open(path).map_err(io)?);
    let mut names = Vec::new();
    while let Some(line) = lines.next().map_err(io)? {
        names.push(line.text().map(str::to_string).map_err(|reason| Error::ItemsFile {
            path: path.to_path_buf(),
            place: format!("line {}", names.len() + 1),
            reason,
        })?);
    }
    Ok(names)
}

fn assign(arguments: &Assign) -> Result<()> {
    let inputs = [Some(&arguments.embeddings), arguments.names.as_ref(), arguments.titles.as_ref()];
    for input in inputs.into_iter().flatten() {
        refuse_same_file("--output", Some(&arguments.output), input)?;
    }
    let quantizer = Quantizer::open(&arguments.codebooks)?;
    let (embeddings, dim) = matrix(&arguments.embeddings)?;
    if dim != quantizer.dim() {
        let reason = format!("have {dim} numbers, the quantiser takes {}", quantizer.dim());
        return Err(Error::InvalidOption { option: "--embeddings", reason });
    }
    let num_items = embeddings.len() / dim;
    let lines = |option: &'static str, path: &PathBuf| {
        let lines = read_lines(path)?;
        match lines.len() == num_items {
            true => Ok(lines),
            false => {
                let reason = format!("has {} lines for {num_items} embeddings", lines.len());
                Err(Error::InvalidOption { option, reason })
            }
        }
    };
    let names = match &arguments.names {
        None => (0..num_items).map(|item| item.to_string()).collect(),
        Some(path) => lines("--names", path)?,
    };
    let titles = arguments.titles.as_ref().map(|path| lines("--titles", path)).transpose()?;
    let collision = match arguments.collisions {
        CollisionName::Share => Collision::Share,
        CollisionName::Append => Collision::Append,
    };
    let spinner = spinner("assigning");
    let sids = quantizer.sids(&embeddings, collision)?;
    let failed = write_error(Some(&arguments.output));
    let mut output = OutputFile::create(&arguments.output).map_err(&failed)?;
    for (row, (name, sid)) in names.iter().zip(&sids).enumerate() {
        let mut line = serde_json::json!({"item": name, "sid": sid.codes()});
        if let Some(titles) = &titles {
            line["title"] = titles[row].clone().into();
        }
        writeln!(output, "{line}").map_err(&failed)?;
    }
    output.finish().map_err(&failed)?;
    spinner.finish_and_clear();
    let distinct = sids.iter().collect::<std::collections::HashSet<_>>().len();
    let output = arguments.output.display();
    say(&format!("{output}: {num_items} items on {distinct} semantic IDs"));
    Ok(())
}

fn build(arguments: &Build) -> Result<()> {
    if items::is_items_file(&arguments.output) {
        let reason = "ends as a file of items does; name the catalog otherwise, as items.sidereal";
        return Err(Error::InvalidOption { option: "--output", reason: reason.into() });
    }
    refuse_same_file("--output", Some(&arguments.output), &arguments.items)?;
    let num_pending = change_log::num_pending(&arguments.output)?;
    if num_pending > 0 && arguments.watermark.is_empty() {
        let reason = format!(
            "{} holds changes that the catalog there lacks (batches: {num_pending}); compile them \
             in with `sidereal catalog change --compact` first, keep the later ones with \
             --watermark, or delete the log",
            change_log::path_of(&arguments.output).display()
        );
        return Err(Error::InvalidOption { option: "--output", reason });
    }
    let bytes = std::fs::metadata(&arguments.items).ok().map(|metadata| metadata.len());
    let progress = progress_bar(bytes, "reading items");
    let mut builder = CatalogBuilder::default();
    let add = |item| builder.add(item);
    items::read(&arguments.items, &arguments.ignore, add, |read| progress.set_position(read))?;
    progress.set_message("laying out");
    let whole = |error| items::whole_file_error(&arguments.items, &error);
    let catalog = builder.build().map_err(whole)?;
    catalog.set_watermarks(&arguments.watermark)?;
    let snapshot = catalog.snapshot();
    if num_pending == 0 {
        catalog.save(&arguments.output)?;
    } else {
        let writer = CatalogWriter::open(&arguments.output, &WriterOptions::default())?;
        let kept = writer.replace_base(&catalog)?.kept_batches;
        say(&format!("batches of changes that are later than the items and were kept: {kept}"));
    }
    progress.finish_and_clear();
    let (items, sids) = (snapshot.num_items(), snapshot.base().trie().num_leaves());
    let levels = snapshot.num_levels();
    let output = arguments.output.display();
    say(&format!("{output}: {items} items, {sids} semantic IDs of {levels} levels"));
    if let Some(warning) = catalog.warning() {
        say(&format!("warning: {warning}"));
    }
    Ok(())
}

fn inspect(arguments: &Inspect) -> Result<()> {
    let summary = Summary::of(&Catalog::open(&arguments.catalog)?.snapshot())?;
    let text = match arguments.json {
        true => serde_json::to_string_pretty(&summary).expect("numbers have a JSON form"),
        false => summary.to_text(&arguments.catalog),
    };
    writeln!(std::io::stdout(), "{text}").map_err(write_error(None))
}

#[derive(Serialize)]
struct Summary {
    /// Items that are there now, changes included; of these are `titles`, `weighted` and
    /// `unavailable`.
    items: usize,
    /// Items of the file, before the changes that are not compiled yet; of these are all figures
    /// of semantic IDs, of the trie and of tags.
    compiled_items: usize,
    /// Items added or replaced since the file was compiled, also those deleted again.
    put: usize,
    /// Compiled items that were deleted or replaced since.
    deleted: usize,
    sids: usize,
    levels: usize,
    /// Items that are not alone on their semantic ID.
    collisions: usize,
    largest_collision: usize,
    /// By level: distinct codes.
    codes_in_use: Vec<usize>,
    /// By level: children of a node, on average and at most.
    mean_fan_out: Vec<f64>,
    largest_fan_out: Vec<usize>,
    trie_bytes: usize,
    trie_bytes_per_item: f64,
    /// Of the compiled file; absent where the catalog was compiled from items just now.
    file_bytes: Option<u64>,
    titles: usize,
    /// Items with a weight of their own.
    weighted: usize,
    /// Items that stand in histories alone.
    unavailable: usize,
    /// Items by tag.
    tags: BTreeMap<String, u64>,
    snapshot: u64,
    /// How far each feed has been applied.
    watermarks: Vec<Watermark>,
    /// `put` and `deleted` together.
    changed: usize,
}

impl Summary {
    fn of(snapshot: &Snapshot) -> Result<Summary> {
        let trie = snapshot.base().trie();
        let levels = 0..trie.num_levels();
        let codes_in_use = |level| trie.codes_at(level).iter().collect::<BTreeSet<_>>().len();
        let nodes = |level| trie.nodes_at(level);
        let shared = trie.leaves().map(|(_, items)| items.len());
        let (mut collisions, mut largest_collision) = (0, 0);
        for items in shared {
            collisions += if items > 1 { items } else { 0 };
            largest_collision = largest_collision.max(items);
        }
        let count =
            |is: &dyn Fn(u32) -> bool| snapshot.all_items().filter(|&item| is(item)).count();
        Ok(Summary {
            items: snapshot.num_items(),
            compiled_items: trie.num_items(),
            put: snapshot.num_put(),
            deleted: snapshot.num_deleted(),
            sids: trie.num_leaves(),
            levels: trie.num_levels(),
            collisions,
            largest_collision,
            codes_in_use: levels.clone().map(codes_in_use).collect(),
            mean_fan_out: levels
                .clone()
                .map(|level| nodes(level + 1).len() as f64 / nodes(level).len().max(1) as f64)
                .collect(),
            largest_fan_out: levels
                .map(|level| {
                    nodes(level).map(|node| trie.children(node).0.len()).max().unwrap_or(0)
                })
                .collect(),
            trie_bytes: trie.size_bytes(),
            trie_bytes_per_item: trie.size_bytes() as f64 / trie.num_items().max(1) as f64,
            file_bytes: snapshot.base().file_bytes(),
            titles: count(&|item| snapshot.title(item).is_some()),
            weighted: count(&|item| !snapshot.weight(item).is_default()),
            unavailable: count(&|item| !snapshot.is_available(item)),
            tags: snapshot.base().tags()?.into_iter().collect(),
            snapshot: snapshot.number(),
            watermarks: snapshot.watermarks().iter().collect(),
            changed: snapshot.num_put() + snapshot.num_deleted(),
        })
    }

    fn to_text(&self, path: &Path) -> String {
        let mut text = format!(
            "{}\n  items          {} ({} with a title)\n",
            path.display(),
            self.items,
            self.titles,
        );
        if self.unavailable > 0 {
            text += &format!("  unavailable    {} items\n", self.unavailable);
        }
        if self.weighted > 0 {
            text += &format!("  weights        {} items have one of their own\n", self.weighted);
        }
        if self.put + self.deleted > 0 {
            text += &format!(
                "  compiled       {} items, which the figures below are of; since then {} put, {} \
                 deleted or replaced\n",
                self.compiled_items, self.put, self.deleted,
            );
        }
        text += &format!(
            "  semantic IDs   {} of {} levels\n  \
             collisions     {} items share a semantic ID, at most {} one\n",
            self.sids, self.levels, self.collisions, self.largest_collision,
        );
        for level in 0..self.levels {
            text += &format!(
                "  level {level}        {} codes in use, fan-out {:.1} on average, {} at most\n",
                self.codes_in_use[level], self.mean_fan_out[level], self.largest_fan_out[level],
            );
        }
        text += &format!(
            "  trie           {} bytes, {:.2} an item\n",
            self.trie_bytes, self.trie_bytes_per_item
        );
        if !self.tags.is_empty() {
            let mut tags: Vec<_> = self.tags.iter().collect();
            tags.sort_by_key(|&(_, &items)| std::cmp::Reverse(items));
            let shown = tags.iter().take(TAGS_SHOWN).map(|(tag, items)| format!("{tag} ({items})"));
            let shown = shown.collect::<Vec<_>>().join(", ");
            let more = tags.len().saturating_sub(TAGS_SHOWN);
            let more = if more > 0 { format!(" and {more} more") } else { String::new() };
            text += &format!("  tags           {}: {shown}{more}\n", tags.len());
        }
        text += &format!("  snapshot       {}\n", self.snapshot);
        for watermark in &self.watermarks {
            text += &format!("  watermark      {watermark}\n");
        }
        match self.file_bytes {
            Some(bytes) => text += &format!("  file           {bytes} bytes"),
            None => text += "  file           not compiled (a file of items)",
        }
        text
    }
}
