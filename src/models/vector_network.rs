//! Networks whose output is a vector: a history in, one query vector out.
//!
//! Sequential recommenders of the classic kind score an item by the product of the history's vector
//! with the item's own. The vector is all that the network computes; the items are another matter
//! ([`vectors`](crate::vectors)).

use std::path::Path;
use std::sync::Arc;

use serde_json::{Map, Value};

use super::config::Config;
use super::network::Activations;
use super::weights::Weights;
use crate::backend::{Backend, Batch, KvLayout};
use crate::error::{Error, Result};
use crate::features;
use crate::tensor::Tensor;

/// The families that give vectors, by their names in `sidereal.json`.
pub const VECTOR_FAMILIES: [&str; 4] = ["sasrec", "bert4rec", "gru4rec", "hstu"];

/// What a caller must know of a network that gives vectors.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct VectorSpec {
    /// Columns of a query vector, and of an item's.
    pub columns: usize,
    /// Rows of the item table that are items or the padding row, which is row 0.
    pub num_rows: usize,
    /// Items of a history that are read: the newest ones.
    pub max_items: usize,
    /// Tokens of the longest prompt.
    pub max_tokens: usize,
    /// The keys and values that it keeps while it reads a prompt.
    pub kv: KvLayout,
}

/// The history of a request, as a network that gives vectors sees it.
#[derive(Debug, Clone, Default)]
pub struct Events<'a> {
    /// Rows of the item table, the oldest item first, at most
    /// [`max_items`](VectorSpec::max_items) of them.
    pub rows: Vec<u32>,
    /// What else is known of each; empty where nothing is known of any.
    pub features: Vec<&'a Map<String, Value>>,
    /// The time of the request, in seconds.
    pub time: Option<i64>,
}

impl Events<'_> {
    /// The times of all entries and, behind them, that of the request.
    ///
    /// # Errors
    /// [`Error::InvalidField`] where one is missing: no other time means the same.
    pub fn seconds(&self) -> Result<Vec<i64>> {
        let missing = |field, what: &str| Error::InvalidField {
            field,
            reason: format!("this network reads times, and {what} has none; {TIME_FORM}"),
        };
        let mut seconds = self.wholes("time")?;
        if seconds.len() < self.rows.len() {
            return Err(missing("history", &format!("entry {}", seconds.len())));
        }
        seconds.push(self.time.ok_or_else(|| missing("time", "the request"))?);
        Ok(seconds)
    }

    /// A feature of all entries that is a number below `count`.
    ///
    /// # Errors
    /// [`Error::InvalidField`] where one is missing or is none.
    pub fn numbers(&self, name: &str, count: usize) -> Result<Vec<u32>> {
        let values = self.wholes(name)?;
        let invalid = |reason: String| Err(Error::InvalidField { field: "history", reason });
        if values.len() < self.rows.len() {
            return invalid(format!(
                "this network reads {name:?}, and entry {} has none",
                values.len()
            ));
        }
        match values.iter().position(|&value| value < 0 || value as usize >= count) {
            Some(at) => invalid(format!(
                "entry {at} has the {name} {}; the network knows 0 to {}",
                values[at],
                count - 1
            )),
            None => Ok(values.into_iter().map(|value| value as u32).collect()),
        }
    }

    /// A feature of the entries, up to the first that does not have it.
    fn wholes(&self, name: &str) -> Result<Vec<i64>> {
        let values = self.features.iter().map(|entry| features::whole(entry, name, "history"));
        values.map_while(Result::transpose).collect()
    }
}

/// How a request says its times.
const TIME_FORM: &str =
    "write {\"history\": [{\"item\": \"17\", \"time\": 1700000000}], \"time\": 1700000100}";

/// What a network reads of one history.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct VectorPrompt {
    /// Rows of the item table.
    pub tokens: Vec<u32>,
    /// What is looked up beside each, where the network does so: its rating.
    pub second_tokens: Vec<u32>,
    /// The times of the tokens and of what follows, where the network reads them.
    pub seconds: Vec<i64>,
}

impl From<Vec<u32>> for VectorPrompt {
    /// A prompt of rows alone.
    fn from(tokens: Vec<u32>) -> VectorPrompt {
        VectorPrompt { tokens, ..VectorPrompt::default() }
    }
}

/// The tokens of all prompts.
pub(super) fn tokens_of(prompts: &[VectorPrompt]) -> Vec<u32> {
    prompts.iter().flat_map(|prompt| &prompt.tokens).copied().collect()
}

/// A network that gives vectors, with its weights on a device.
///
/// It reads each prompt as a whole, in one pass, by the operations that all networks are made of.
pub trait VectorNetwork<B: Backend>: Send + Sync {
    /// What a caller must know of it.
    fn spec(&self) -> &VectorSpec;

    /// What the network reads of a history.
    ///
    /// # Errors
    /// [`Error::EmptyInput`] where the network has no input for an empty history;
    /// [`Error::InvalidField`] where it reads a feature that is missing or wrong.
    fn prompt(&self, events: &Events<'_>) -> Result<VectorPrompt>;

    /// Reads whole prompts, those of all slots of the batch. Leaves a query vector for each prompt in
    /// `activations.hidden`, `[prompts, columns]`.
    fn forward(
        &self,
        backend: &B,
        prompts: &[VectorPrompt],
        batch: &mut Batch<'_, B>,
        activations: &mut Activations<B>,
    );
}

/// A network that gives vectors, and what it scores items by.
pub struct VectorModel<B: Backend> {
    /// The network.
    pub network: Arc<dyn VectorNetwork<B>>,
    /// `[num_rows, columns]`, the items' vectors; row 0 is the padding.
    pub items: Tensor,
    /// `[num_rows]`, added to the products, where the family has it.
    pub bias: Option<Tensor>,
}

/// Whether a folder's `sidereal.json` names one of the [`VECTOR_FAMILIES`].
///
/// # Errors
/// The file's, where it is there.
pub(crate) fn gives_vectors(folder: &Path) -> Result<bool> {
    let path = folder.join("sidereal.json");
    if !path.exists() {
        return Ok(false);
    }
    let config = Config::read(&path)?;
    Ok(config.text("family").is_some_and(|family| VECTOR_FAMILIES.contains(&family)))
}

/// The shape of a matrix of the checkpoint.
///
/// # Errors
/// [`Error::MissingTensor`]; [`Error::TensorShape`] where it is no matrix with rows and columns.
pub(super) fn matrix_shape(weights: &Weights, name: &str) -> Result<[usize; 2]> {
    let found = weights.shapes().into_iter().find(|(other, _)| other == name);
    let Some((_, shape)) = found else {
        return Err(Error::MissingTensor { name: name.into(), hint: String::new() });
    };
    match shape[..] {
        [rows, columns] if rows > 0 && columns > 0 => Ok([rows, columns]),
        _ => Err(Error::TensorShape { name: name.into(), found: shape, expected: vec![1, 1] }),
    }
}

/// How many layers the checkpoint has: the first number for which there is no such tensor.
pub(super) fn num_layers(weights: &Weights, name: impl Fn(usize) -> String) -> usize {
    (0..).take_while(|&layer| weights.contains(&name(layer))).count()
}

/// The table of items, with at least the padding row and one item.
///
/// # Errors
/// Those of [`matrix_shape`]; [`Error::ModelConfig`] where it has no item.
pub(super) fn item_shape(config: &Config, weights: &Weights, name: &str) -> Result<[usize; 2]> {
    let [rows, columns] = matrix_shape(weights, name)?;
    match rows {
        0 | 1 => Err(config.error(format!("{name:?} has {rows} rows, the padding and no item"))),
        _ => Ok([rows, columns]),
    }
}
