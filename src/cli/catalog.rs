//! `sidereal catalog`: build and inspect.

use std::collections::{BTreeMap, BTreeSet};
use std::io::Write;
use std::path::{Path, PathBuf};

use clap::{Args, Subcommand};
use serde::Serialize;
use sidereal::catalog::{Catalog, CatalogBuilder, Snapshot, items};
use sidereal::{Error, Result};

use super::requests::progress_bar;
use super::{Outcome, refuse_same_file, say, write_error};

#[derive(Subcommand)]
pub enum Command {
    /// Compile a file of items into one memory-mapped file
    Build(Build),
    /// Print what a catalog holds
    Inspect(Inspect),
}

#[derive(Args)]
#[command(after_help = "\
Items are JSON lines, {\"item\": \"17\", \"sid\": [3, 250, 7], \"title\": \"...\"}, or, where the name ends in
.json, the field's index: {\"17\": [\"<a_3>\", \"<b_250>\", \"<c_7>\"], ...}. Several items may share a semantic ID.

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

pub fn run(command: &Command) -> Result<Outcome> {
    match command {
        Command::Build(arguments) => build(arguments)?,
        Command::Inspect(arguments) => inspect(arguments)?,
    }
    Ok(Outcome::Done)
}

fn build(arguments: &Build) -> Result<()> {
    if items::is_items_file(&arguments.output) {
        let reason = "ends as a file of items does; name the catalog otherwise, as items.sidereal";
        return Err(Error::InvalidField { field: "--output", reason: reason.into() });
    }
    refuse_same_file("--output", Some(&arguments.output), &arguments.items)?;
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
            changed: snapshot.num_changed(),
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
