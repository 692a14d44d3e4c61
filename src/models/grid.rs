//! Checkpoints of GRID (Ju et al. 2025): T5 under other names, and no `config.json`.
//!
//! GRID trains TIGER as T5 stacks with one table for the codes of all levels, a separator row after
//! each item, a start row, a head for each level, an optional row for the user, and feed-forward
//! layers of n hidden layers with biases. As tokens the rows are: the table's, level by level; the
//! separator, where there is one; the start; the users.

use std::path::Path;

use serde_json::{Map, Value, json};

use super::config::Config;
use crate::checkpoint::Tensors;
use crate::error::{Error, Result};
use crate::tensor::Tensor;

/// The rows of all levels' codes.
const TABLE: &str = "item_sid_embedding_table_encoder.weight";
const SEPARATOR: &str = "sep_token";
const START: &str = "decoder.bos_token";
const USERS: &str = "user_embedding.weight";

/// Whether tensors are those of a checkpoint of GRID.
pub(super) fn is_grid(tensors: &Tensors) -> bool {
    prefix(tensors).is_some()
}

/// What trainers put before the names.
fn prefix(tensors: &Tensors) -> Option<String> {
    tensors.floats.keys().find_map(|name| name.strip_suffix(TABLE)).map(Into::into)
}

fn head(level: usize) -> String {
    format!("decoder.decoder_mlp.{level}.weight")
}

/// Gives tensors T5's names, and reads their sizes.
fn read_sizes(folder: &Path, tensors: &mut Tensors) -> Result<Sizes> {
    let before = prefix(tensors).unwrap_or_default();
    tensors.rename(folder, |name| {
        let name = name.strip_prefix(&*before).unwrap_or(name);
        let stacks = [("encoder.encoder.encoder.", "encoder."), ("decoder.decoder.", "decoder.")];
        let stack = stacks.iter().find_map(|(from, to)| Some((name.strip_prefix(from)?, to)));
        stack.map_or(name.into(), |(rest, to)| format!("{to}{rest}"))
    })?;
    Sizes::read(tensors).map_err(|reason| Error::ModelFolder { path: folder.to_path_buf(), reason })
}

/// The smallest `sidereal.json` that fits a checkpoint.
///
/// # Errors
/// [`Error::ModelFolder`] where its shapes make no such network.
pub(super) fn layout(folder: &Path, mut tensors: Tensors) -> Result<Value> {
    Ok(read_sizes(folder, &mut tensors)?.layout())
}

/// The configuration and the tensors of the T5 that a checkpoint is.
///
/// # Errors
/// [`Error::ModelFolder`] where its shapes make no such network, or where `sidereal.json` is missing:
/// with the one that fits.
pub(super) fn to_t5(folder: &Path, mut tensors: Tensors) -> Result<(Config, Tensors)> {
    let error = |reason: String| Error::ModelFolder { path: folder.to_path_buf(), reason };
    let sizes = read_sizes(folder, &mut tensors)?;
    if !folder.join("sidereal.json").exists() {
        let Sizes { num_levels, codes, .. } = sizes;
        return Err(error(format!(
            "these are weights of GRID, of {num_levels} levels of {codes} codes, and sidereal.json is \
             missing; write {}",
            sizes.layout()
        )));
    }
    let Sizes { num_levels, codes, width, .. } = sizes;
    let mut rows = Vec::new();
    for name in [TABLE, SEPARATOR, START, USERS] {
        rows.extend(tensors.floats.remove(name).iter().flat_map(Tensor::to_vec));
    }
    let num_tokens = rows.len() / width;
    let mut heads = Vec::with_capacity(rows.len());
    for level in 0..num_levels {
        heads.extend(tensors.floats.remove(&head(level)).iter().flat_map(Tensor::to_vec));
    }
    // Rows that are no code are never asked for.
    heads.resize(rows.len(), 0.0);
    let shape = [num_tokens, width];
    tensors.floats.insert("shared.weight".into(), Tensor::new(&shape, rows));
    tensors.floats.insert("lm_head.weight".into(), Tensor::new(&shape, heads));
    tensors.notes.push(format!(
        "weights of GRID: {num_levels} levels of {codes} codes, {num_tokens} tokens, start token {}",
        sizes.start()
    ));
    let config = Config::new(&folder.join("config.json"), sizes.config(num_tokens));
    Ok((config, tensors))
}

/// What the shapes of a checkpoint say.
struct Sizes {
    num_levels: usize,
    codes: usize,
    width: usize,
    has_separator: bool,
    user_bins: usize,
    num_heads: usize,
    head_dim: usize,
    inner: usize,
    num_blocks: [usize; 2],
}

impl Sizes {
    /// Reads them of tensors under T5's names.
    fn read(tensors: &Tensors) -> std::result::Result<Sizes, String> {
        let matrix = |name: &str| match tensors.floats.get(name).map(Tensor::shape) {
            Some(&[rows, columns]) if rows > 0 && columns > 0 => Ok([rows, columns]),
            Some(shape) => Err(format!("a tensor of GRID, {name:?}, has the shape {shape:?}")),
            None => Err(format!("weights of GRID without {name:?}")),
        };
        let [num_rows, width] = matrix(TABLE)?;
        let [codes, _] = matrix(&head(0))?;
        let num_levels = (0..).take_while(|&level| matrix(&head(level)).is_ok()).count();
        let is_head = |level| matrix(&head(level)) == Ok([codes, width]);
        if num_rows != num_levels * codes || !(0..num_levels).all(is_head) {
            return Err(format!(
                "weights of GRID with {num_levels} heads of {codes} codes and {num_rows} rows for codes, \
                 which must be as many"
            ));
        }
        let single = |name: &str| match tensors.floats.get(name) {
            None => Ok(false),
            Some(tensor) if tensor.shape() == [1, width] => Ok(true),
            Some(tensor) => Err(format!("{name:?} has the shape {:?}", tensor.shape())),
        };
        if !single(START)? {
            return Err(format!("weights of GRID without {START:?}"));
        }
        let user_bins = match tensors.floats.contains_key(USERS) {
            true => matrix(USERS)?[0],
            false => 0,
        };
        let layer = "encoder.block.0.layer";
        let [_, num_heads] =
            matrix(&format!("{layer}.0.SelfAttention.relative_attention_bias.weight"))?;
        let [query_dim, _] = matrix(&format!("{layer}.0.SelfAttention.q.weight"))?;
        let inner = [
            format!("{layer}.1.mlp.model.0.weight"),
            format!("{layer}.1.DenseReluDense.wi.weight"),
        ];
        let inner = inner.iter().find_map(|name| matrix(name).ok()).map_or(width, |[rows, _]| rows);
        let blocks = |stack: &str| {
            let name = |block| format!("{stack}.block.{block}.layer.0.layer_norm.weight");
            (0..).take_while(|&block: &usize| tensors.floats.contains_key(&name(block))).count()
        };
        Ok(Sizes {
            num_levels,
            codes,
            width,
            has_separator: single(SEPARATOR)?,
            user_bins,
            num_heads,
            head_dim: query_dim / num_heads,
            inner,
            num_blocks: [blocks("encoder"), blocks("decoder")],
        })
    }

    fn separator(&self) -> usize {
        self.num_levels * self.codes
    }

    fn start(&self) -> usize {
        self.separator() + usize::from(self.has_separator)
    }

    fn config(&self, num_tokens: usize) -> Map<String, Value> {
        let config = json!({
            "architectures": ["T5ForConditionalGeneration"],
            "model_type": "t5",
            "d_model": self.width,
            "num_heads": self.num_heads,
            "d_kv": self.head_dim,
            "d_ff": self.inner,
            "num_layers": self.num_blocks[0],
            "num_decoder_layers": self.num_blocks[1],
            "vocab_size": num_tokens,
            "tie_word_embeddings": false,
            "decoder_start_token_id": self.start(),
        });
        config.as_object().cloned().expect("an object")
    }

    /// The smallest `sidereal.json` that fits.
    fn layout(&self) -> Value {
        let is_default =
            (self.num_levels, self.codes, self.has_separator, self.user_bins) == (4, 256, true, 0);
        if is_default {
            return json!({"project": "grid"});
        }
        let level = |level| json!({"size": self.codes, "first_token": self.codes * level});
        let mut pieces = Vec::new();
        if self.user_bins > 0 {
            let first_token = self.start() + 1;
            pieces.push(json!({"user": {"first_token": first_token, "bins": self.user_bins}}));
        }
        pieces.push(match self.has_separator {
            true => json!({
                "items": "{{ sid }}", "separator": [self.separator()], "trailing_separator": true,
            }),
            false => json!({"items": "{{ sid }}"}),
        });
        json!({
            "levels": (0..self.num_levels).map(level).collect::<Vec<Value>>(),
            "prompt": {"pieces": pieces},
            "normalize": "level",
        })
    }
}
