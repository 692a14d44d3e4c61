//! `sidereal retrieve`: histories in, the items with the nearest vectors out.

use std::path::PathBuf;

use clap::Args;
use sidereal::wire::RequestDefaults;
use sidereal::{ModelKind, Result};

use super::arguments::{LeniencyArguments, ModelArguments, Outcome};
use super::recommend::{AnswerArguments, answer};

#[derive(Args)]
#[command(after_help = "\
For networks that give a vector instead of writing a semantic ID: SASRec,
BERT4Rec, GRU4Rec. A request line, of which all but the history may be left
out:
  {\"id\": \"u1\", \"history\": [\"17\", \"4\"], \"top_k\": 10}
Which items may come back:
  \"exclude\"           not these;   \"exclude_history\": true, none of the history
  \"only\"              these alone
  \"filter\"            \"tag:garden & !tag:adult\"
  \"groups\"            [\"tag:a\", \"tag:b\"], the best of each
An answer line; a score is a product of vectors, not a log-probability:
  {\"id\": \"u1\", \"items\": [{\"item\": \"9\", \"sid\": [3, 250], \"score\": 5.1}], ...}

Examples:
  sidereal retrieve --model DIR --requests users.jsonl --top-k 100
  sidereal retrieve --model DIR --requests - --exclude-history
  echo '{\"history\": [\"17\"]}' | sidereal retrieve --model DIR --requests -")]
pub struct Arguments {
    #[command(flatten)]
    model: ModelArguments,
    /// Requests, one JSON object a line; - for the standard input
    #[arg(long, value_name = "FILE")]
    requests: PathBuf,
    /// Items of an answer at most
    #[arg(long, default_value_t = 10, value_name = "K", value_parser = clap::value_parser!(u32).range(1..))]
    top_k: u32,
    #[command(flatten)]
    leniency: LeniencyArguments,
    /// Leave out what the user's history has; a line's exclude_history wins
    #[arg(long)]
    exclude_history: bool,
    #[command(flatten)]
    answers: AnswerArguments,
}

pub fn run(arguments: &Arguments) -> Result<Outcome> {
    let mut defaults = RequestDefaults::default();
    arguments.leniency.apply(&mut defaults);
    defaults.top_k = arguments.top_k as usize;
    defaults.exclude_history = arguments.exclude_history;
    defaults.titles = true;
    let recommender = arguments.model.open_kind(ModelKind::Vectors)?;
    answer(&recommender, &arguments.requests, &arguments.answers, &defaults, Ok)
}
