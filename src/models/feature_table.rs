//! Embedding tables of features: numbers of items, users and whatever else, up to billions of rows.

use std::collections::HashMap;
use std::path::Path;

use serde_json::{Map, Value};

use super::config::Config;
use super::weights::Weights;
use crate::checkpoint::{files, npy};
use crate::error::{Error, Result};
use crate::features;
use crate::tensor::Tensor;

/// The embedding tables of a folder, by the names of their features.
///
/// A table in a file of its own, `tables/NAME.npy` or `tables/NAME.safetensors`, stays there: it is
/// mapped, and a request reads the rows that it needs. Other tables are tensors
/// `_embedding_collection.embeddings.NAME.weight` of the checkpoint.
pub(super) struct FeatureTables {
    tables: HashMap<String, Table>,
}

struct Table {
    /// `[rows, columns]`
    rows: Tensor,
    /// Whether numbers are taken modulo the rows.
    is_hashed: bool,
}

impl FeatureTables {
    /// The tables of these features, all of one width. `hashed` of the configuration names those
    /// whose numbers are hashed; all other numbers must be rows.
    ///
    /// # Errors
    /// Those of the files; [`Error::MissingTensor`]; [`Error::TensorShape`];
    /// [`Error::ModelConfig`] where a hashed feature has no table.
    pub fn open(config: &Config, weights: &mut Weights, names: &[&str]) -> Result<FeatureTables> {
        let hashed = config.texts("hashed")?;
        if let Some(name) = hashed.iter().find(|name| !names.contains(&name.as_str())) {
            return Err(
                config.error(format!("\"hashed\" names {name:?}, which is no feature here"))
            );
        }
        let folder = config.path().parent().unwrap_or(Path::new("")).join("tables");
        let mut tables = HashMap::new();
        let mut columns = None;
        for &name in names {
            let rows = table_of(&folder, name, weights)?;
            let found = rows.shape().to_vec();
            let width = *columns.get_or_insert(found.get(1).copied().unwrap_or(0));
            if found.len() != 2 || found[0] == 0 || width == 0 || found[1] != width {
                let expected = vec![found.first().copied().unwrap_or(0), width];
                return Err(Error::TensorShape { name: name.into(), found, expected });
            }
            let is_hashed = hashed.iter().any(|hashed| hashed == name);
            tables.insert(name.to_string(), Table { rows, is_hashed });
        }
        Ok(FeatureTables { tables })
    }

    /// Columns of a row.
    pub fn columns(&self) -> usize {
        self.tables.values().next().map_or(0, |table| table.rows.shape()[1])
    }

    /// Rows of a table.
    pub fn num_rows(&self, name: &str) -> usize {
        self.tables[name].rows.shape()[0]
    }

    /// The row of a number.
    ///
    /// # Errors
    /// [`Error::InvalidField`] with `field` where the table has no such row.
    pub fn row(&self, name: &str, number: i64, field: &'static str) -> Result<usize> {
        let table = &self.tables[name];
        let count = table.rows.shape()[0];
        match table.is_hashed {
            true => Ok(number.rem_euclid(count as i64) as usize),
            false if (0..count as i64).contains(&number) => Ok(number as usize),
            false => Err(Error::InvalidField {
                field,
                reason: format!("{name:?} is {number}; the model knows 0 to {}", count - 1),
            }),
        }
    }

    /// Appends a row to `out`; zeros where there is none.
    pub fn read(&self, name: &str, row: Option<usize>, out: &mut Vec<f32>) {
        let (table, columns) = (&self.tables[name], self.columns());
        let at = out.len();
        out.resize(at + columns, 0.0);
        if let Some(row) = row {
            table.rows.read(row * columns..(row + 1) * columns, &mut out[at..]);
        }
    }
}

fn table_of(folder: &Path, name: &str, weights: &mut Weights) -> Result<Tensor> {
    let path = folder.join(format!("{name}.npy"));
    if path.exists() {
        return npy::open(&path);
    }
    let path = folder.join(format!("{name}.safetensors"));
    if path.exists() {
        let tensors = files::open_file(&path)?;
        return match (tensors.floats.len(), tensors.floats.into_values().next()) {
            (1, Some(tensor)) => Ok(tensor),
            (count, _) => Err(Error::WeightsFile {
                path,
                reason: format!("holds {count} tensors of floating-point numbers, not one"),
            }),
        };
    }
    let tensor = format!("_embedding_collection.embeddings.{name}.weight");
    if !weights.contains(&tensor) {
        let hint = format!(" (or put the table of {name:?} into tables/{name}.npy)");
        return Err(Error::MissingTensor { name: tensor, hint });
    }
    let shape = super::vector_network::matrix_shape(weights, &tensor)?;
    weights.take(&tensor, &shape)
}

/// A feature's number, where an object has it.
///
/// # Errors
/// [`Error::InvalidField`] where it is no whole number.
pub(super) fn number(
    given: Option<&Map<String, Value>>,
    name: &str,
    field: &'static str,
) -> Result<Option<i64>> {
    given.map_or(Ok(None), |given| features::whole(given, name, field))
}
