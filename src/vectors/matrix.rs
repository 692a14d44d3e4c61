//! The items' vectors.

use std::path::Path;
use std::sync::Arc;

use super::codes::Codes;
use crate::checkpoint::{files, npy};
use crate::error::{Error, Result};
use crate::tensor::{Dtype, Tensor};

/// How a query vector scores an item's vector.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Metric {
    /// The sum of the products of their columns.
    Dot,
    /// Minus the squared Euclidean distance, so that the nearest item has the highest score.
    L2,
}

/// The vectors of all items, `[rows, columns]`, in f32, f16 or bf16; cheap to clone.
///
/// A matrix that was opened from a file stays there and is read by the pages that a scan touches. The
/// file must not be written to: put another one in its place instead.
#[derive(Clone)]
pub struct ItemMatrix {
    vectors: Tensor,
    /// By row, or empty.
    bias: Vec<f32>,
    metric: Metric,
    /// A smaller copy, where it was asked for.
    codes: Option<Arc<Codes>>,
}

impl ItemMatrix {
    /// A matrix of these vectors. `bias`, where given, is `[rows]` and is added to the scores.
    ///
    /// # Errors
    /// [`Error::TensorShape`] where `vectors` is no matrix or `bias` has another length;
    /// [`Error::NonFiniteWeight`].
    pub fn new(vectors: Tensor, bias: Option<&Tensor>, metric: Metric) -> Result<ItemMatrix> {
        let name = || "item vectors".to_string();
        let [rows, columns] = vectors.shape()[..] else {
            let found = vectors.shape().to_vec();
            return Err(Error::TensorShape { name: name(), found, expected: vec![1, 1] });
        };
        if columns == 0 || rows >= u32::MAX as usize {
            let (found, expected) = (vectors.shape().to_vec(), vec![rows, 1]);
            return Err(Error::TensorShape { name: name(), found, expected });
        }
        if let Some(bias) = bias.filter(|bias| bias.shape() != [rows]) {
            let (name, found) = ("bias of items".into(), bias.shape().to_vec());
            return Err(Error::TensorShape { name, found, expected: vec![rows] });
        }
        for (name, tensor) in [("item vectors", Some(&vectors)), ("bias of items", bias)] {
            if let Some(index) = tensor.and_then(Tensor::first_non_finite) {
                return Err(Error::NonFiniteWeight { name: name.into(), index });
            }
        }
        Ok(ItemMatrix {
            bias: bias.map_or(Vec::new(), Tensor::to_vec),
            vectors,
            metric,
            codes: None,
        })
    }

    /// Maps a file: `.npy` with one matrix in C order (f32 or f16), or safetensors with one tensor.
    ///
    /// # Errors
    /// The operating system's; [`Error::WeightsFile`] where the file is damaged, or holds another
    /// number of tensors than one or another number type; those of [`ItemMatrix::new`].
    pub fn open(path: &Path, metric: Metric) -> Result<ItemMatrix> {
        let vectors = match path.extension().and_then(|extension| extension.to_str()) {
            Some("npy") => npy::open(path)?,
            _ => {
                let tensors = files::open_file(path)?;
                let count = tensors.floats.len() + tensors.others.len();
                match (count, tensors.floats.into_values().next()) {
                    (1, Some(tensor)) => tensor,
                    _ => {
                        let reason = format!(
                            "{count} tensors are there; a file of item vectors holds one, in f32, \
                             f16 or bf16"
                        );
                        return Err(Error::WeightsFile { path: path.to_path_buf(), reason });
                    }
                }
            }
        };
        ItemMatrix::new(vectors, None, metric)
    }

    /// The number of rows.
    pub fn num_rows(&self) -> usize {
        self.vectors.shape()[0]
    }

    /// The number of columns.
    pub fn num_columns(&self) -> usize {
        self.vectors.shape()[1]
    }

    /// How queries score rows.
    pub fn metric(&self) -> Metric {
        self.metric
    }

    /// The number type that the vectors are stored in.
    pub fn dtype(&self) -> Dtype {
        self.vectors.dtype()
    }

    /// Adds a copy in 8 bits (a quarter of f32's memory, and 12 bytes a row), by which searches rule most
    /// rows out. What they find is the same to the last bit. Nothing is added for [`Metric::L2`], nor
    /// where a vector is longer than 1e15. Computed on the threads of the current pool.
    #[must_use]
    pub fn with_codes(mut self) -> ItemMatrix {
        if self.metric == Metric::Dot {
            self.codes = Codes::of(&self.vectors).map(Arc::new);
        }
        self
    }

    /// Bytes of the copy in 8 bits; 0 without one.
    pub fn codes_bytes(&self) -> usize {
        self.codes.as_ref().map_or(0, |codes| codes.num_bytes())
    }

    /// The copy in 8 bits.
    pub(super) fn codes(&self) -> Option<&Codes> {
        self.codes.as_deref()
    }

    /// Checks that nobody has written to the file since it was mapped.
    ///
    /// # Errors
    /// [`Error::FileChanged`].
    pub fn check_file(&self) -> Result<()> {
        self.vectors.check_file()
    }

    /// All numbers as they lie in memory, where they are in f32.
    pub(super) fn as_f32(&self) -> Option<&[f32]> {
        self.vectors.as_f32()
    }

    /// Reads a row in f32.
    pub(super) fn read_row(&self, row: u32, out: &mut [f32]) {
        let first = row as usize * self.num_columns();
        self.vectors.read(first..first + out.len(), out);
    }

    /// What is added to the score of a row.
    pub(super) fn bias(&self, row: u32) -> f32 {
        self.bias.get(row as usize).copied().unwrap_or(0.0)
    }
}
