//! The command line: commands and exit codes.

use std::process::ExitCode;

use clap::{Parser, Subcommand};
use sidereal::Error;

use arguments::{Outcome, say};

mod arguments;
mod bench;
mod catalog;
mod check;
mod device;
mod embeddings;
mod evaluate;
mod inspect;
mod load;
mod measure;
mod output;
mod plot;
mod recommend;
mod report;
mod requests;
mod selftest;
#[cfg(feature = "server")]
mod serve;
mod shapes;
mod tally;

/// Exact recommendations from generative models: semantic IDs under a catalog's trie.
#[derive(Parser)]
#[command(
    version,
    max_term_width = 100,
    after_help = "\
Examples:
  sidereal recommend --model models/industrial --requests models/industrial/users.jsonl --top-k 5
  sidereal catalog build --items items.jsonl --output items.sidereal
  sidereal bench --shape tiger --beams 50 --history 20 --threads 1

Exit codes: 0 all went well, 1 some requests failed, 2 nothing could run."
)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Recommend items for each history
    Recommend(recommend::Arguments),
    /// Score given items for each history
    Rank(recommend::RankArguments),
    /// Build, inspect and change catalogs; make semantic IDs from embeddings
    #[command(
        subcommand,
        after_help = "\
Examples:
  sidereal catalog build --items items.index.json --output items.sidereal
  sidereal catalog change items.sidereal --changes today.jsonl --compact"
    )]
    Catalog(catalog::Command),
    /// Compute recall and NDCG over requests whose next item is known
    Evaluate(evaluate::Arguments),
    /// Show what is understood of a model folder, and write its sidereal.json
    Inspect(inspect::Arguments),
    /// Measure latency, throughput and where the time goes
    Bench(bench::Arguments),
    /// Serve models by HTTP and gRPC
    #[cfg(feature = "server")]
    Serve(Box<serve::Arguments>),
    /// Check a device against the CPU, operation by operation, and measure it
    Selftest(selftest::Arguments),
}

/// Runs the command line.
pub fn run() -> ExitCode {
    let outcome = match Cli::parse().command {
        Command::Recommend(arguments) => recommend::run(&arguments),
        Command::Rank(arguments) => recommend::run_rank(&arguments),
        Command::Catalog(command) => catalog::run(&command),
        Command::Evaluate(arguments) => evaluate::run(&arguments),
        Command::Inspect(arguments) => inspect::run(&arguments),
        Command::Bench(arguments) => bench::run(&arguments),
        #[cfg(feature = "server")]
        Command::Serve(arguments) => serve::run(&arguments),
        Command::Selftest(arguments) => selftest::run(&arguments),
    };
    match outcome {
        Ok(Outcome::Done) => ExitCode::SUCCESS,
        Ok(Outcome::SomeFailed) => ExitCode::from(1),
        // Whoever read our output has had enough of it, as `head` does.
        Err(Error::Io { source, .. }) if source.kind() == std::io::ErrorKind::BrokenPipe => {
            ExitCode::SUCCESS
        }
        Err(error) => {
            say(&format!("error: {error}"));
            ExitCode::from(2)
        }
    }
}
