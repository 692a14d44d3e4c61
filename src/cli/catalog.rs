//! `sidereal catalog`: build, inspect and change catalogs; fit codebooks and assign semantic IDs.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};

use clap::{Args, Subcommand, ValueEnum};
use serde::Serialize;
use sidereal::catalog::sid::MAX_LEVELS;
use sidereal::catalog::{Catalog, CatalogBuilder, Snapshot, change_log, items};
use sidereal::quantizer::{Collision, FitOptions, FitRound, Quantizer};
use sidereal::{CatalogWriter, Error, Result, WriterOptions};

use super::arguments::{Outcome, refuse_same_file, say, write_error};
use super::requests::{count_bar, progress_bar, spinner};

#[derive(Subcommand)]
pub enum Command {
    /// Compile a file of items into one memory-mapped file
    Build(Build),
    /// Print what a catalog holds
    Inspect(Inspect),
    /// Put, delete and tag items, and set their availability
    Change(Changes),
    /// Fit the codebooks of a residual quantiser to embeddings
    Fit(Fit),
    /// Assign semantic IDs to items by their embeddings
    Assign(Assign),
}

#[derive(Args)]
#[command(after_help = "\
Items are JSON lines, {\"item\": \"17\", \"sid\": [3, 250, 7], \"title\": \"...\", \"tags\": [\"new\"]}, or, where the
name ends in .json, the field's index: {\"17\": [\"<a_3>\", \"<b_250>\", \"<c_7>\"], ...}. Several items may share
a semantic ID. An item with \"available\": false may stand in histories and is never recommended.

Example:
  sidereal catalog build --items items.index.json --output items.sidereal")]
pub struct Build {
    /// File of items
    #[arg(long, value_name = "FILE")]
    items: PathBuf,
    /// Where the catalog goes; an existing one is replaced at once
    #[arg(long, value_name = "FILE")]
    output: PathBuf,
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
They go to a log beside the catalog, which everything that opens the catalog reads.

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
}

#[derive(Args)]
#[command(after_help = "\
The embeddings are a safetensors file or NumPy's .npy with one matrix, a row an item. The codebooks come out as
codebooks.0, codebooks.1 and so on. Equal seeds give equal codebooks.

Example:
  sidereal catalog fit --embeddings items.safetensors --levels 3 --codes 256 --output codebooks.safetensors")]
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
The codebooks are a safetensors file: fitted here, or an RQ-VAE as LC-Rec and MiniOneRec train it.
Items come out as JSON lines, ready for `sidereal catalog build`.

Example:
  sidereal catalog assign --embeddings items.safetensors --names names.txt --codebooks codebooks.safetensors \\
    --collisions append --output items.jsonl")]
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
        Command::Build(arguments) => build(arguments)?,
        Command::Inspect(arguments) => inspect(arguments)?,
        Command::Change(arguments) => change(arguments)?,
        Command::Fit(arguments) => fit(arguments)?,
        Command::Assign(arguments) => assign(arguments)?,
    }
    Ok(Outcome::Done)
}

fn change(arguments: &Changes) -> Result<()> {
    // Every line is read before the first is applied: a file with a bad line changes nothing.
    let mut changes = Vec::new();
    let bytes = std::fs::metadata(&arguments.changes).ok().map(|metadata| metadata.len());
    let progress = progress_bar(bytes, "reading changes");
    let take = |change| {
        changes.push(change);
        Ok(())
    };
    items::read_changes(&arguments.changes, take, |read| progress.set_position(read))?;
    progress.finish_and_clear();
    let options = WriterOptions { compact_at: Some(usize::MAX), ..WriterOptions::default() };
    let writer = CatalogWriter::open(&arguments.catalog, &options)?;
    let progress = count_bar(changes.len() as u64, "applying changes");
    let mut without_effect = 0;
    for batch in changes.chunks(CHANGES_PER_BATCH) {
        let before = writer.catalog().snapshot();
        without_effect += batch.iter().filter(|change| before.is_without_effect(change)).count();
        writer.apply(batch)?;
        progress.inc(batch.len() as u64);
    }
    writer.sync()?;
    progress.finish_and_clear();
    if arguments.compact {
        let spinner = spinner("compiling the catalog anew");
        writer.compact()?;
        spinner.finish_and_clear();
    }
    let snapshot = writer.catalog().snapshot();
    say(&format!(
        "{}: {} changes applied ({without_effect} named items that were not known), now {} items, \
         snapshot {}",
        arguments.catalog.display(),
        changes.len(),
        snapshot.num_items(),
        snapshot.number(),
    ));
    Ok(())
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
    quantizer.save(&arguments.output)?;
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
        let text = std::fs::read_to_string(path).map_err(write_error(Some(path)))?;
        let lines: Vec<String> = text.lines().map(str::to_string).collect();
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
    let mut output = BufWriter::new(File::create(&arguments.output).map_err(&failed)?);
    for (row, (name, sid)) in names.iter().zip(&sids).enumerate() {
        let mut line = serde_json::json!({"item": name, "sid": sid.codes()});
        if let Some(titles) = &titles {
            line["title"] = titles[row].clone().into();
        }
        writeln!(output, "{line}").map_err(&failed)?;
    }
    output.flush().map_err(&failed)?;
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
    let log = change_log::path_of(&arguments.output);
    if log.exists() {
        let reason = format!(
            "{} holds changes of the catalog that is there; delete it, or apply them with \
             `sidereal catalog change --compact` first",
            log.display()
        );
        return Err(Error::InvalidOption { option: "--output", reason });
    }
    let bytes = std::fs::metadata(&arguments.items).ok().map(|metadata| metadata.len());
    let progress = progress_bar(bytes, "reading items");
    let mut builder = CatalogBuilder::default();
    items::read(&arguments.items, |item| builder.add(item), |read| progress.set_position(read))?;
    progress.set_message("laying out");
    let whole = |error| items::whole_file_error(&arguments.items, &error);
    let catalog = builder.build().map_err(whole)?;
    catalog.save(&arguments.output)?;
    progress.finish_and_clear();
    let snapshot = catalog.snapshot();
    let (items, sids) = (snapshot.num_items(), snapshot.base().trie().num_leaves());
    let levels = snapshot.num_levels();
    let output = arguments.output.display();
    say(&format!("{output}: {items} items, {sids} semantic IDs of {levels} levels"));
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
    items: usize,
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
    /// Items that stand in histories alone.
    unavailable: usize,
    /// Items by tag, of the compiled ones.
    tags: BTreeMap<String, u64>,
    snapshot: u64,
    /// Items added, replaced or deleted since the file was compiled; they are not in the figures
    /// of the trie.
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
            unavailable: count(&|item| !snapshot.is_available(item)),
            tags: snapshot.base().tags()?.into_iter().collect(),
            snapshot: snapshot.number(),
            changed: snapshot.num_put() + snapshot.num_deleted(),
        })
    }

    fn to_text(&self, path: &Path) -> String {
        let mut text = format!(
            "{}\n  items          {} ({} with a title)\n  semantic IDs   {} of {} levels\n  \
             collisions     {} items share a semantic ID, at most {} one\n",
            path.display(),
            self.items,
            self.titles,
            self.sids,
            self.levels,
            self.collisions,
            self.largest_collision,
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
        if self.unavailable > 0 {
            text += &format!("  unavailable    {} items\n", self.unavailable);
        }
        if !self.tags.is_empty() {
            let mut tags: Vec<_> = self.tags.iter().collect();
            tags.sort_by_key(|&(_, &items)| std::cmp::Reverse(items));
            let shown = tags.iter().take(TAGS_SHOWN).map(|(tag, items)| format!("{tag} ({items})"));
            let shown = shown.collect::<Vec<_>>().join(", ");
            let more = tags.len().saturating_sub(TAGS_SHOWN);
            let more = if more > 0 { format!(" and {more} more") } else { String::new() };
            text += &format!("  tags           {}: {shown}{more}\n", tags.len());
        }
        text += &format!("  snapshot       {}", self.snapshot);
        match self.changed {
            0 => text += "\n",
            changed => text += &format!(", {changed} items changed since it was compiled\n"),
        }
        match self.file_bytes {
            Some(bytes) => text += &format!("  file           {bytes} bytes"),
            None => text += "  file           not compiled (a file of items)",
        }
        text
    }
}
