//! The rows of DLRM-v3: features of the user, of each entry of a history and of each candidate become
//! what the first block reads.

use std::ops::Range;

use serde_json::{Map, Value};

use super::config::Config;
use super::feature_table::{FeatureTables, number};
use super::mlp::Mlp;
use super::network::Activations;
use super::score_network::{ScoreRequest, ScoredItem};
use super::stu::Projection;
use super::weights::Weights;
use crate::backend::{Backend, Batch, Epilogue};
use crate::error::{Error, Result};
use crate::tensor::Tensor;

const PREPROCESSOR: &str = "_hstu_transducer._input_preprocessor.";
const ENCODER: &str = "_hstu_transducer._positional_encoder.";
/// Actions whose combinations a table has room for.
const MAX_ACTIONS: usize = 12;

/// A feature of the user that has a row of its own.
struct ContextFeature {
    name: String,
    /// Entries that a history must have, candidates counted, for the feature to be read.
    min_history: usize,
}

/// What makes rows.
pub(super) struct RowBuilder<B: Backend> {
    tables: FeatureTables,
    columns: usize,
    /// The features of an item; the first is its own number.
    item_features: Vec<String>,
    context: Vec<ContextFeature>,
    /// By feature of the context.
    context_layers: Vec<Projection<B>>,
    content: Mlp<B>,
    /// Of the item's further features.
    further: Option<Mlp<B>>,
    actions: Option<Actions<B>>,
    positions: B::Table,
    num_positions: usize,
    /// By age.
    times: B::Table,
    num_times: usize,
    /// Candidates that are counted with a history, whatever their number.
    counted: usize,
}

/// What the small network of actions makes of each combination of them.
struct Actions<B: Backend> {
    /// The feature of a history's entries that holds them, as bits.
    feature: String,
    bits: Vec<i64>,
    /// By combination; then of candidates; then zeros, of rows that have no action.
    table: B::Table,
}

/// The rows of a request.
pub(super) struct Rows {
    /// `[rows, columns]`: those of the context, then of candidates.
    values: Vec<f32>,
    /// By row: of the tables of actions, of positions and of ages.
    actions: Vec<u32>,
    positions: Vec<u32>,
    pub ages: Vec<u32>,
    /// Rows before the candidates.
    pub context_len: usize,
    /// The same, and the candidates that are counted.
    pub counted_len: usize,
    /// `[candidates, item_columns]`, the embeddings of candidates.
    pub items: Vec<f32>,
    /// Of the request.
    pub time: i64,
}

impl<B: Backend> RowBuilder<B> {
    /// What `sidereal.json` says of features, with their tables and networks.
    ///
    /// # Errors
    /// See [`load_scores`](super::load_scores).
    pub fn load(
        backend: &B,
        config: &Config,
        weights: &mut Weights,
        columns: usize,
        counted: usize,
    ) -> Result<RowBuilder<B>> {
        let item_features = config.texts("item_features")?;
        if item_features.is_empty() {
            return Err(config.error(
                "\"item_features\" must name the features of an item, the first that of its own \
                 number: [\"movie_id\"] or [\"item_id\", \"item_category_id\"]"
                    .into(),
            ));
        }
        let context = read_context(config)?;
        let of_context = context.iter().map(|feature| feature.name.as_str());
        let names: Vec<&str> = item_features.iter().map(String::as_str).chain(of_context).collect();
        let tables = FeatureTables::open(config, weights, &names)?;
        let width = tables.columns();
        let further = format!("{PREPROCESSOR}_additional_embedding_mlp");
        let inputs =
            weights.matrix_shape_of(&format!("{further}.0.weight")).map_or(0, |[_, inputs]| inputs);
        let further = match item_features.len() {
            1 if inputs > 0 => {
                return Err(config.error(format!(
                    "\"item_features\" names one feature, and the checkpoint has a network for {} more",
                    inputs / width.max(1)
                )));
            }
            1 => None,
            count => {
                Some(Mlp::load(backend, weights, &further, [width * (count - 1), columns], true)?)
            }
        };
        let content = format!("{PREPROCESSOR}_content_embedding_mlp");
        let position_name = format!("{ENCODER}_position_embeddings_weight");
        let time_name = format!("{ENCODER}_timestamp_embeddings_weight");
        let num_positions = weights.num_rows(&position_name).unwrap_or(0);
        let num_times = weights.num_rows(&time_name).unwrap_or(0);
        if num_positions <= context.len() {
            return Err(config.error(format!(
                "{num_positions} positions are fewer than the rows of \"context_features\""
            )));
        }
        let content = Mlp::load(backend, weights, &content, [width, columns], true)?;
        Ok(RowBuilder {
            context_layers: load_context(backend, weights, context.len(), [width, columns])?,
            actions: Actions::load(backend, config, weights, columns)?,
            positions: backend
                .table(weights.take(&position_name, &[num_positions, columns])?, None)?,
            times: backend.table(weights.take(&time_name, &[num_times, columns])?, None)?,
            num_positions,
            num_times,
            content,
            further,
            context,
            item_features,
            tables,
            columns,
            counted,
        })
    }

    /// Columns of the embeddings of a candidate.
    pub fn item_columns(&self) -> usize {
        self.item_features.len() * self.tables.columns()
    }

    /// Rows of the user's features.
    pub fn num_context(&self) -> usize {
        self.context.len()
    }

    /// Rows of the item table.
    pub fn num_items(&self) -> usize {
        self.tables.num_rows(&self.item_features[0])
    }

    /// The rows of a request.
    ///
    /// # Errors
    /// [`Error::InvalidField`] where a feature is missing or wrong; the device's.
    pub fn build(
        &self,
        backend: &B,
        request: &ScoreRequest<'_>,
        s: &mut Activations<B>,
    ) -> Result<Rows> {
        let (num_context, num_history) = (self.context.len(), request.history.len());
        let (width, columns) = (self.tables.columns(), self.columns);
        let missing = |field, reason: String| Error::InvalidField { field, reason };
        let Some(time) = request.time else {
            let reason = "this network reads the request's time, in seconds: \"time\": 1700000000";
            return Err(missing("time", reason.into()));
        };
        let context_len = num_context + num_history;
        let mut rows = Rows {
            values: Vec::new(),
            actions: vec![self.no_action(); num_context],
            positions: (0..num_context as u32).collect(),
            // Rows of the context are as old as can be: their time is 0 in the published code.
            ages: vec![self.age(time); num_context],
            context_len,
            counted_len: context_len + self.counted,
            items: Vec::new(),
            time,
        };
        let (mut content, mut further) = (Vec::new(), Vec::new());
        for (at, entry) in request.history.iter().enumerate() {
            self.read_item(entry, "history", &mut content, &mut further)?;
            let seconds = number(entry.features, "time", "history")?.ok_or_else(|| {
                missing(
                    "history",
                    format!("this network reads times, and entry {at} has no \"time\""),
                )
            })?;
            rows.ages.push(self.age(time.saturating_sub(seconds)));
            rows.actions.push(self.action(at, entry.features)?);
            // The distance to the first candidate.
            rows.positions.push(self.position(num_history - at));
        }
        for candidate in &request.candidates {
            self.read_item(candidate, "candidates", &mut content, &mut further)?;
            rows.ages.push(self.age(0));
            rows.actions.push(self.target_action());
            rows.positions.push(self.position(0));
        }
        for (own, further) in content
            .chunks_exact(width)
            .zip(self.further_of(&further, content.len() / width))
            .skip(num_history)
        {
            rows.items.extend_from_slice(own);
            rows.items.extend_from_slice(further);
        }
        let context = self.context_rows(backend, request, s)?;
        self.content.apply(backend, &backend.upload(&content, width), s);
        let mut values = backend.download(&s.hidden)?;
        if let Some(network) = &self.further {
            let columns = width * (self.item_features.len() - 1);
            network.apply(backend, &backend.upload(&further, columns), s);
            let added = backend.download(&s.hidden)?;
            values.iter_mut().zip(added).for_each(|(value, added)| *value += added);
        }
        rows.values = [context, values].concat();
        let scale = (columns as f64).sqrt() as f32;
        rows.values.iter_mut().for_each(|value| *value *= scale);
        Ok(rows)
    }

    /// The further embeddings of each of `count` items, which may have none.
    fn further_of<'f>(&self, further: &'f [f32], count: usize) -> impl Iterator<Item = &'f [f32]> {
        let columns = further.len() / count.max(1);
        (0..count).map(move |at| &further[at * columns..(at + 1) * columns])
    }

    /// Uploads rows of the request, with the embeddings of their actions, places and ages added.
    pub fn write(
        &self,
        backend: &B,
        rows: &Rows,
        range: Range<usize>,
        batch: &mut Batch<'_, B>,
        s: &mut Activations<B>,
    ) {
        let values = &rows.values[range.start * self.columns..range.end * self.columns];
        s.residual = backend.upload(values, self.columns);
        if let Some(actions) = &self.actions {
            let of_rows = &rows.actions[range.clone()];
            backend.add_embedding(&actions.table, of_rows, batch, &mut s.residual);
        }
        let positions = &rows.positions[range.clone()];
        backend.add_embedding(&self.positions, positions, batch, &mut s.residual);
        backend.add_embedding(&self.times, &rows.ages[range], batch, &mut s.residual);
    }

    /// Reads the embeddings of an item and of its further features.
    fn read_item(
        &self,
        item: &ScoredItem<'_>,
        field: &'static str,
        content: &mut Vec<f32>,
        further: &mut Vec<f32>,
    ) -> Result<()> {
        let own = &self.item_features[0];
        self.tables.read(own, Some(self.tables.row(own, item.number, field)?), content);
        for name in &self.item_features[1..] {
            let given = match number(item.features, name, field)? {
                Some(number) => Some(number),
                None => number(item.known, name, field)?,
            };
            let missing = || Error::InvalidField {
                field,
                reason: format!(
                    "item {} has no {name:?}; say it in the request or in item_features.jsonl",
                    item.number
                ),
            };
            let row = self.tables.row(name, given.ok_or_else(missing)?, field)?;
            self.tables.read(name, Some(row), further);
        }
        Ok(())
    }

    /// The rows of the user's features, `[features, columns]`.
    fn context_rows(
        &self,
        backend: &B,
        request: &ScoreRequest<'_>,
        s: &mut Activations<B>,
    ) -> Result<Vec<f32>> {
        let mut rows = Vec::new();
        for (feature, layer) in self.context.iter().zip(&self.context_layers) {
            let is_read = request.history.len() + self.counted >= feature.min_history;
            let given = number(request.context, &feature.name, "features")?;
            let row = match given.filter(|_| is_read) {
                Some(given) => Some(self.tables.row(&feature.name, given, "features")?),
                None => None,
            };
            let mut embedding = Vec::new();
            self.tables.read(&feature.name, row, &mut embedding);
            let x = backend.upload(&embedding, embedding.len());
            layer.apply(backend, &x, Epilogue::Store, &mut s.hidden);
            rows.extend(backend.download(&s.hidden)?);
        }
        Ok(rows)
    }

    fn position(&self, distance: usize) -> u32 {
        (distance + self.context.len()).min(self.num_positions - 1) as u32
    }

    /// The row of an age in seconds: the root of the minutes, in f32 as published.
    fn age(&self, seconds: i64) -> u32 {
        let root = ((seconds as f32).max(1e-6) / 60.0).sqrt();
        (root as u32).min(self.num_times as u32 - 1)
    }

    fn action(&self, at: usize, given: Option<&Map<String, Value>>) -> Result<u32> {
        let Some(actions) = &self.actions else { return Ok(0) };
        let missing = || Error::InvalidField {
            field: "history",
            reason: format!(
                "this network reads actions, and entry {at} has no {:?}",
                actions.feature
            ),
        };
        let given = number(given, &actions.feature, "history")?.ok_or_else(missing)?;
        let bit = |(at, bits): (usize, &i64)| u32::from(given & bits != 0) << at;
        Ok(actions.bits.iter().enumerate().map(bit).sum())
    }

    fn target_action(&self) -> u32 {
        self.actions.as_ref().map_or(0, |actions| 1 << actions.bits.len())
    }

    fn no_action(&self) -> u32 {
        self.actions.as_ref().map_or(0, |actions| (1 << actions.bits.len()) + 1)
    }
}

fn read_context(config: &Config) -> Result<Vec<ContextFeature>> {
    let Some(value) = config.given("context_features") else { return Ok(Vec::new()) };
    let feature = |value: &Value| match value {
        Value::String(name) => Some(ContextFeature { name: name.clone(), min_history: 0 }),
        Value::Object(fields) => Some(ContextFeature {
            name: fields.get("name")?.as_str()?.to_string(),
            min_history: match fields.get("min_history") {
                None => 0,
                Some(value) => value.as_u64()? as usize,
            },
        }),
        _ => None,
    };
    let read = value.as_array().and_then(|list| list.iter().map(feature).collect());
    read.ok_or_else(|| {
        config.error(format!(
            "\"context_features\" is {value}; list the user's features in the order of the training: \
             [\"user_id\", {{\"name\": \"age_group\", \"min_history\": 20}}]"
        ))
    })
}

fn load_context<B: Backend>(
    backend: &B,
    weights: &mut Weights,
    count: usize,
    [width, columns]: [usize; 2],
) -> Result<Vec<Projection<B>>> {
    if count == 0 {
        return Ok(Vec::new());
    }
    let name = format!("{PREPROCESSOR}_batched_contextual_linear_weights");
    let matrices = weights.take(&name, &[count, width, columns])?.to_vec();
    let name = format!("{PREPROCESSOR}_batched_contextual_linear_bias");
    let biases = weights.take(&name, &[count, columns])?.to_vec();
    let layer = |(matrix, bias): (&[f32], &[f32])| {
        // Stored as `[in, out]`.
        let at = |index: usize| matrix[index % width * columns + index / width];
        let matrix = Tensor::new(&[columns, width], (0..matrix.len()).map(at).collect());
        let bias = Tensor::new(&[columns], bias.to_vec());
        Ok(Projection { weight: backend.matrix(&[matrix])?, bias: Some(backend.vector(&[bias])?) })
    };
    matrices.chunks_exact(width * columns).zip(biases.chunks_exact(columns)).map(layer).collect()
}

impl<B: Backend> Actions<B> {
    fn load(
        backend: &B,
        config: &Config,
        weights: &mut Weights,
        columns: usize,
    ) -> Result<Option<Actions<B>>> {
        let name = format!("{PREPROCESSOR}_action_encoder._action_embedding_table");
        let Some([count, width]) = weights.matrix_shape_of(&name) else { return Ok(None) };
        let (Some(feature), Some(bits)) = (config.text("action"), config.given("action_bits"))
        else {
            return Err(config.error(
                "\"action\" must name the feature of a history's entries that holds their actions, and \
                 \"action_bits\" list the bit of each: [1, 2, 4, 8, 16]"
                    .into(),
            ));
        };
        let bits: Vec<i64> = serde_json::from_value(bits.clone())
            .ok()
            .filter(|bits: &Vec<i64>| bits.len() == count && count <= MAX_ACTIONS)
            .ok_or_else(|| {
                config.error(format!(
                    "\"action_bits\" is {bits}; the checkpoint has {count} actions, and {MAX_ACTIONS} \
                     are served"
                ))
            })?;
        let table = weights.take(&name, &[count, width])?.to_vec();
        let name = format!("{PREPROCESSOR}_action_encoder._target_action_embedding_table");
        let target = weights.take(&name, &[1, count * width])?.to_vec();
        let mut inputs = Vec::new();
        for combination in 0..1usize << count {
            for action in 0..count {
                let is_set = combination >> action & 1 == 1;
                let row = &table[action * width..(action + 1) * width];
                inputs.extend(row.iter().map(|&value| if is_set { value } else { 0.0 }));
            }
        }
        inputs.extend(target);
        let name = format!("{PREPROCESSOR}_action_embedding_mlp");
        let network = Mlp::load(backend, weights, &name, [count * width, columns], true)?;
        let mut s = Activations::new(backend);
        network.apply(backend, &backend.upload(&inputs, count * width), &mut s);
        let mut rows = backend.download(&s.hidden)?;
        let scale = (columns as f64).sqrt() as f32;
        rows.iter_mut().for_each(|value| *value *= scale);
        rows.extend(std::iter::repeat_n(0.0, columns));
        let num_rows = rows.len() / columns;
        let table = backend.table(Tensor::new(&[num_rows, columns], rows), None)?;
        Ok(Some(Actions { feature: feature.to_string(), bits, table }))
    }
}
