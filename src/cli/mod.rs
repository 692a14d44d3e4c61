//! What the commands have in common: arguments, opening of models and catalogs, exit codes.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;

use clap::{Args, Parser, Subcommand, ValueEnum};
use device::DtypeName;
use sidereal::catalog::Catalog;
use sidereal::wire::RequestDefaults;
use sidereal::{
    Constraint, Device, EngineOptions, Error, Normalization, Recommender, RecommenderOptions,
    Result,
};

mod bench;
mod catalog;
mod device;
mod evaluate;
mod load;
mod measure;
mod recommend;
mod requests;
mod selftest;
mod shapes;

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
    /// Answer requests: histories in, items out
    Recommend(recommend::Arguments),
    /// Score given items for each history
    Rank(recommend::RankArguments),
    /// Build and inspect catalogs
    #[command(
        subcommand,
        after_help = "\
Example:
  sidereal catalog build --items items.index.json --output items.sidereal"
    )]
    Catalog(catalog::Command),
    /// Recall and NDCG over requests whose next item is known
    Evaluate(evaluate::Arguments),
    /// Measure latency, throughput and where the time goes
    Bench(bench::Arguments),
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
        Command::Bench(arguments) => bench::run(&arguments),
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

/// How a command that could run ended.
enum Outcome {
    Done,
    SomeFailed,
}

#[derive(Args)]
struct ModelArguments {
    /// Model folder: config.json, sidereal.json, safetensors
    #[arg(long, value_name = "DIR")]
    model: PathBuf,
    /// Catalog: a built one, or a file of items; by default the one beside the model
    #[arg(long, value_name = "FILE")]
    catalog: Option<PathBuf>,
    #[command(flatten)]
    device: DeviceArguments,
}

#[derive(Args, Clone)]
struct DeviceArguments {
    /// Device to compute on: cpu, cuda or cuda:N
    #[arg(long, default_value = "cpu", value_parser = device::parse)]
    device: Device,
    /// Number type of activations; by default bf16 on GPUs and f32 on the CPU, which has no other
    #[arg(long)]
    dtype: Option<DtypeName>,
    /// Threads to compute on; 0 for all cores
    #[arg(long, default_value_t = 0, value_name = "N", value_parser = clap::value_parser!(u16).range(..=1024))]
    threads: u16,
    /// The most input tokens of a request
    #[arg(long, default_value_t = EngineOptions::default().max_context, value_name = "TOKENS")]
    max_context: usize,
    /// Tokens of all contexts together, of requests that run and of users who may return; by default what
    /// 256 MiB hold, or half of a GPU's free memory
    #[arg(long, default_value_t = 0, hide_default_value = true, value_name = "TOKENS")]
    context_tokens: usize,
}

#[derive(Args)]
struct SearchArguments {
    /// Beam width: prefixes kept at each level; or one width for each, as 16,64,128
    #[arg(long, default_value = "50", value_name = "W", value_delimiter = ',', value_parser = clap::value_parser!(u16).range(1..=sidereal::MAX_BEAMS as i64))]
    beams: Vec<u16>,
    /// What may follow a prefix
    #[arg(long, default_value = "trie")]
    constraint: ConstraintName,
    /// What scores are normalised over; by default what the model's sidereal.json says, else vocabulary
    #[arg(long)]
    normalize: Option<NormalizationName>,
}

impl SearchArguments {
    fn defaults(&self, top_k: usize) -> RequestDefaults {
        let widths: Vec<usize> = self.beams.iter().map(|&width| width.into()).collect();
        let mut defaults = RequestDefaults::default();
        defaults.beams = *widths.last().expect("clap has a default");
        defaults.widths = if widths.len() == 1 { Vec::new() } else { widths };
        defaults.top_k = top_k;
        defaults.normalization = self.normalize.map(NormalizationName::normalization);
        defaults.constraint = match self.constraint {
            ConstraintName::Trie => Constraint::Trie,
            ConstraintName::Level => Constraint::Level,
            ConstraintName::None => Constraint::None,
        };
        defaults
    }
}

#[derive(Clone, Copy, ValueEnum)]
enum ConstraintName {
    /// Codes that lead to an item that exists and is allowed
    Trie,
    /// Any code of the level
    Level,
    /// Any token of the vocabulary
    None,
}

#[derive(Clone, Copy, ValueEnum)]
enum NormalizationName {
    /// The model's whole vocabulary
    Vocabulary,
    /// The codes of the level
    Level,
    /// The codes that are legal after the prefix
    Children,
}

impl NormalizationName {
    fn normalization(self) -> Normalization {
        match self {
            NormalizationName::Vocabulary => Normalization::Vocabulary,
            NormalizationName::Level => Normalization::Level,
            NormalizationName::Children => Normalization::Children,
        }
    }
}

/// Names under which a catalog is looked for beside a model, the first that exists.
const CATALOG_NAMES: [&str; 3] = ["catalog.sidereal", "items.jsonl", "items.index.json"];

impl ModelArguments {
    fn open_catalog(&self) -> Result<Arc<Catalog>> {
        let path = match &self.catalog {
            Some(path) => path.clone(),
            None => catalog_beside(&self.model)?,
        };
        Ok(Arc::new(Catalog::open(&path)?))
    }

    fn open(&self) -> Result<Recommender> {
        self.open_with(&self.device.options()?)
    }

    fn open_with(&self, options: &RecommenderOptions) -> Result<Recommender> {
        let spinner = requests::spinner("opening the model");
        let recommender = Recommender::open(&self.model, self.open_catalog()?, options)?;
        spinner.finish_and_clear();
        Ok(recommender)
    }
}

fn catalog_beside(model: &Path) -> Result<PathBuf> {
    if !model.is_dir() {
        let reason = "there is no such model folder".into();
        return Err(Error::ModelFolder { path: model.to_path_buf(), reason });
    }
    let candidates = CATALOG_NAMES.map(|name| model.join(name));
    candidates.into_iter().find(|path| path.exists()).ok_or_else(|| Error::ModelFolder {
        path: model.to_path_buf(),
        reason: format!(
            "no catalog is beside the model ({}); name one with --catalog",
            CATALOG_NAMES.join(", ")
        ),
    })
}

/// An error of writing to `path`, or to the standard output.
fn write_error(path: Option<&Path>) -> impl Fn(std::io::Error) -> Error + '_ {
    move |source| Error::io(path.unwrap_or(Path::new("standard output")), source)
}

/// Tells the user something beside the output; nobody may be listening.
fn say(text: &str) {
    let _ = writeln!(std::io::stderr(), "{text}");
}

/// Refuses to write over what is being read.
fn refuse_same_file(option: &'static str, output: Option<&Path>, input: &Path) -> Result<()> {
    let is_input = |output| same_file::is_same_file(output, input).unwrap_or(false);
    match output.is_some_and(is_input) {
        true => Err(Error::InvalidOption {
            option,
            reason: format!("{} is the input; name another file", input.display()),
        }),
        false => Ok(()),
    }
}
