//! Networks whose output is scores: a history and candidates in, one number a task and candidate out.

use std::path::Path;
use std::sync::Arc;

use serde_json::{Map, Value};

use super::config::Config;
use super::network::Activations;
use crate::backend::{Backend, KvLayout};
use crate::error::Result;

/// The families that score candidates, by their names in `sidereal.json`.
pub const SCORE_FAMILIES: [&str; 1] = ["dlrm_hstu"];

/// What a network says of a candidate.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Task {
    /// Its name, as in the training: `click`.
    pub name: String,
    /// Whether its score is a probability, else a value: a watch time.
    pub is_probability: bool,
}

/// What a caller must know of a network that scores candidates.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ScoreSpec {
    /// What it says of each candidate, in the order of its scores.
    pub tasks: Vec<Task>,
    /// Items of a history that are read: the newest ones.
    pub max_items: usize,
    /// Rows of a context at most: those of the history, and of what describes the user.
    pub max_context: usize,
    /// Rows of the item table, where items are known by rows.
    pub num_items: usize,
    /// The keys and values that it keeps while it scores.
    pub kv: KvLayout,
}

/// An item of a request, with what else is known of it.
#[derive(Debug, Clone, Copy)]
pub struct ScoredItem<'a> {
    /// Its number: the row of the folder's `item_rows.json`, or the number that its name is.
    pub number: i64,
    /// What the request says of it.
    pub features: Option<&'a Map<String, Value>>,
    /// What the folder says of it, where the request is silent.
    pub known: Option<&'a Map<String, Value>>,
}

/// A request, as a network that scores candidates sees it.
#[derive(Debug, Clone, Default)]
pub struct ScoreRequest<'a> {
    /// The oldest item first, at most [`max_items`](ScoreSpec::max_items) of them.
    pub history: Vec<ScoredItem<'a>>,
    /// At least one.
    pub candidates: Vec<ScoredItem<'a>>,
    /// Of the user and the request.
    pub context: Option<&'a Map<String, Value>>,
    /// The time of the request, in seconds.
    pub time: Option<i64>,
}

/// A network that scores candidates, with its weights on a device.
pub trait ScoreNetwork<B: Backend>: Send + Sync {
    /// What a caller must know of it.
    fn spec(&self) -> &ScoreSpec;

    /// The scores of a request, `[candidates, tasks]`, in passes through `memory`, which has pages for
    /// [`max_context`](ScoreSpec::max_context) rows and those of a pass, [`ROWS_PER_PASS`]. A
    /// candidate's scores depend on no other candidate, unless the network has groups of them.
    ///
    /// # Errors
    /// [`InvalidField`](crate::Error::InvalidField) where a feature is missing or wrong; the device's.
    fn score(
        &self,
        backend: &B,
        memory: &B::Memory,
        request: &ScoreRequest<'_>,
        activations: &mut Activations<B>,
    ) -> Result<Vec<f32>>;
}

/// Rows that a pass reads at most.
pub const ROWS_PER_PASS: usize = 512;

/// A network that scores candidates.
pub type ScoreModel<B> = Arc<dyn ScoreNetwork<B>>;

/// Whether a folder's `sidereal.json` names one of the [`SCORE_FAMILIES`].
///
/// # Errors
/// The file's, where it is there.
pub(crate) fn scores_candidates(folder: &Path) -> Result<bool> {
    let path = folder.join("sidereal.json");
    if !path.exists() {
        return Ok(false);
    }
    let config = Config::read(&path)?;
    Ok(config.text("family").is_some_and(|family| SCORE_FAMILIES.contains(&family)))
}
