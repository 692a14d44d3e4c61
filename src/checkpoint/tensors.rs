//! The tensors of one or several files, by name.

use std::collections::BTreeMap;
use std::path::Path;

use crate::error::{Error, Result};
use crate::tensor::Tensor;

/// What the files of a checkpoint hold.
#[derive(Clone, Default)]
pub(crate) struct Tensors {
    /// Tensors of floating-point numbers.
    pub floats: BTreeMap<String, Tensor>,
    /// Tensors of other numbers, by name: the number type, as `I64`.
    pub others: BTreeMap<String, String>,
    /// What the files hold besides and nobody reads, in words for their owner.
    pub notes: Vec<String>,
}

impl Tensors {
    /// Adds the tensors of another file.
    ///
    /// # Errors
    /// [`Error::WeightsFile`] where a name is in both.
    pub fn extend(&mut self, other: Tensors, path: &Path) -> Result<()> {
        for (name, tensor) in other.floats {
            if self.floats.insert(name.clone(), tensor).is_some() {
                let reason = format!("tensor {name:?} is in two files");
                return Err(Error::WeightsFile { path: path.to_path_buf(), reason });
            }
        }
        self.others.extend(other.others);
        self.notes.extend(other.notes);
        Ok(())
    }

    /// Gives every tensor the name that `rename` makes of its own.
    ///
    /// # Errors
    /// [`Error::ModelConfig`] where two tensors get one name.
    pub fn rename(&mut self, path: &Path, rename: impl Fn(&str) -> String) -> Result<()> {
        let mut origin: BTreeMap<String, String> = BTreeMap::new();
        let mut floats = BTreeMap::new();
        for (old, tensor) in std::mem::take(&mut self.floats) {
            let new = rename(&old);
            if let Some(first) = origin.insert(new.clone(), old.clone()) {
                let reason = format!(
                    "tensors {first:?} and {old:?} both stand for {new:?}; keep the one that is meant"
                );
                return Err(Error::ModelConfig { path: path.to_path_buf(), reason });
            }
            floats.insert(new, tensor);
        }
        self.floats = floats;
        let others = std::mem::take(&mut self.others).into_iter();
        self.others = others.map(|(name, dtype)| (rename(&name), dtype)).collect();
        Ok(())
    }
}
