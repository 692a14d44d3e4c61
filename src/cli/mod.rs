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
mod evaluation;
mod inspect;
mod load;
mod measure;
mod output;
mod plot;
mod recommend;
mod report;
mod requests;
mod retrieve;
mod selftest;
#[cfg(feature = "server")]
mod serve;
mod shapes;
mod tally;
mod terminal;

/// Exact recommendations from generative models: semantic IDs under a catalog's trie.
#[derive(Parser)]
#[command(
    version,
    max_term_width = 80,
    after_help = "\
Examples:
  sidereal recommend --model DIR --requests users.jsonl --top-k 5
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
    /// Find the items whose vectors are nearest to each history's
    Retrieve(retrieve::Arguments),
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
        Command::Retrieve(arguments) => retrieve::run(&arguments),
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

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    fn commands(command: &clap::Command, all: &mut Vec<clap::Command>) {
        all.push(command.clone());
        command.get_subcommands().for_each(|below| commands(below, all));
    }

    /// The commands of a line of an example, by their arguments.
    fn of_line(line: &str) -> Vec<Vec<String>> {
        let of_part = |part: &str| {
            let mut quoted = part.split('\'').enumerate();
            let mut words: Vec<String> = Vec::new();
            for (at, text) in &mut quoted {
                match at % 2 {
                    0 => words.extend(text.split_whitespace().map(str::to_string)),
                    _ => words.push(text.to_string()),
                }
            }
            words
        };
        line.split(" | ")
            .map(of_part)
            .filter(|words| words.first().is_some_and(|word| word == "sidereal"))
            .collect()
    }

    /// At 80 columns nothing is broken in mid-command, and what is copied is understood.
    #[test]
    fn help_fits_80_columns_and_its_examples_are_understood() {
        let mut all = Vec::new();
        commands(&Cli::command(), &mut all);
        let mut examples = 0;
        for command in all {
            let name = command.get_name().to_string();
            let help = command.clone().term_width(80).render_long_help().to_string();
            for line in help.lines() {
                assert!(line.chars().count() <= 80, "{name}: {line}");
            }
            let Some(after) = command.get_after_help() else { continue };
            for line in after.to_string().lines() {
                assert!(help.contains(line), "{name}: broken by the terminal's width: {line}");
                for arguments in of_line(line.trim()).into_iter().filter(|_| line.starts_with("  "))
                {
                    examples += 1;
                    let parsed = Cli::try_parse_from(&arguments);
                    assert!(
                        parsed.is_ok(),
                        "{line}: {}",
                        parsed.err().map(|e| e.to_string()).unwrap_or_default()
                    );
                }
            }
        }
        assert!(examples > 20, "only {examples} examples were found");
    }
}
