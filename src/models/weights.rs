//! The weights of a checkpoint: every name, shape and number checked.

use std::collections::{BTreeMap, HashSet};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use safetensors::SafeTensors;
use serde::Deserialize;

use crate::error::{Error, Result};
use crate::mapping::Mapping;
use crate::tensor::{Dtype, Tensor};

/// The tensors of a checkpoint, each to be taken once.
#[derive(Clone)]
pub struct Weights {
    source: Source,
    taken: HashSet<String>,
    num_taken: usize,
}

#[derive(Clone)]
enum Source {
    Files(BTreeMap<String, Tensor>),
    /// Whatever is asked for, at random: for benchmarks of a shape.
    Random(fastrand::Rng),
}

impl Weights {
    /// Maps the safetensors files of a Hugging Face folder: those that
    /// `model.safetensors.index.json` lists, or `model.safetensors`.
    ///
    /// A network that is loaded has copies of its weights. The files are read again where some of
    /// the weights are replaced, and must not have been written to until then.
    ///
    /// # Errors
    /// The operating system's, or [`Error::WeightsFile`] where a file is damaged.
    pub fn open(folder: &Path) -> Result<Weights> {
        Weights::open_files(weight_files(folder)?)
    }

    /// Maps one safetensors file.
    ///
    /// # Errors
    /// As [`open`](Weights::open).
    pub fn open_file(path: &Path) -> Result<Weights> {
        Weights::open_files(vec![path.to_path_buf()])
    }

    fn open_files(paths: Vec<PathBuf>) -> Result<Weights> {
        let mut tensors = BTreeMap::new();
        for path in paths {
            let mapping = Arc::new(Mapping::open(&path, 0)?);
            let error = |reason: String| Error::WeightsFile { path: path.clone(), reason };
            let parsed = SafeTensors::deserialize(mapping.bytes())
                .map_err(|source| error(format!("not a whole safetensors file ({source})")))?;
            let first_byte = mapping.bytes().as_ptr().addr();
            for (name, view) in parsed.tensors() {
                let dtype = match view.dtype() {
                    safetensors::Dtype::F32 => Dtype::F32,
                    safetensors::Dtype::F16 => Dtype::F16,
                    safetensors::Dtype::BF16 => Dtype::Bf16,
                    other => {
                        let reason =
                            format!("tensor {name:?} is {other:?}; f32, f16, bf16 can be read");
                        return Err(Error::ModelConfig { path: path.clone(), reason });
                    }
                };
                let start = view.data().as_ptr().addr() - first_byte;
                let bytes = start..start + view.data().len();
                let tensor = Tensor::mapped(view.shape(), Arc::clone(&mapping), bytes, dtype);
                if tensors.insert(name.clone(), tensor).is_some() {
                    return Err(error(format!("tensor {name:?} is in two files")));
                }
            }
        }
        Ok(Weights { source: Source::Files(tensors), taken: HashSet::new(), num_taken: 0 })
    }

    /// Weights drawn at random, of whatever names and shapes a network asks for.
    pub fn random(seed: u64) -> Weights {
        let rng = fastrand::Rng::with_seed(seed);
        Weights { source: Source::Random(rng), taken: HashSet::new(), num_taken: 0 }
    }

    /// Weights in memory.
    pub fn from_tensors(tensors: impl IntoIterator<Item = (String, Tensor)>) -> Weights {
        Weights {
            source: Source::Files(tensors.into_iter().collect()),
            taken: HashSet::new(),
            num_taken: 0,
        }
    }

    /// Puts other tensors in the place of those of the same names and shapes.
    ///
    /// # Errors
    /// [`Error::UnexpectedTensor`], [`Error::TensorShape`]; nothing was replaced then.
    pub fn replace(&mut self, tensors: Vec<(String, Tensor)>) -> Result<()> {
        let Source::Files(own) = &mut self.source else {
            return Err(Error::Unsupported {
                what: "replacing weights that were drawn at random".into(),
                way_out: "those of a checkpoint can be".into(),
            });
        };
        for (name, tensor) in &tensors {
            let Some(before) = own.get(name) else {
                return Err(Error::UnexpectedTensor { name: name.clone() });
            };
            if before.shape() != tensor.shape() {
                return Err(Error::TensorShape {
                    name: name.clone(),
                    found: tensor.shape().to_vec(),
                    expected: before.shape().to_vec(),
                });
            }
        }
        own.extend(tensors);
        Ok(())
    }

    /// The names and shapes of all tensors.
    pub fn shapes(&self) -> Vec<(String, Vec<usize>)> {
        match &self.source {
            Source::Files(tensors) => {
                let shape =
                    |(name, tensor): (&String, &Tensor)| (name.clone(), tensor.shape().to_vec());
                tensors.iter().map(shape).collect()
            }
            Source::Random(_) => Vec::new(),
        }
    }

    /// Whether the checkpoint has a tensor of this name.
    pub fn contains(&self, name: &str) -> bool {
        match &self.source {
            Source::Files(tensors) => tensors.contains_key(name),
            Source::Random(_) => false,
        }
    }

    /// The tensor of this name, which must have this shape and finite numbers.
    ///
    /// # Errors
    /// [`Error::MissingTensor`], [`Error::TensorShape`], [`Error::NonFiniteWeight`];
    /// [`Error::FileChanged`].
    pub fn take(&mut self, name: &str, shape: &[usize]) -> Result<Tensor> {
        self.num_taken += shape.iter().product::<usize>();
        match &mut self.source {
            Source::Files(tensors) => {
                let tensor = tensors.get(name).cloned();
                let tensor = tensor.ok_or_else(|| Error::MissingTensor { name: name.into() })?;
                if tensor.shape() != shape {
                    return Err(Error::TensorShape {
                        name: name.into(),
                        found: tensor.shape().to_vec(),
                        expected: shape.to_vec(),
                    });
                }
                tensor.check_file()?;
                if let Some(index) = tensor.first_non_finite() {
                    return Err(Error::NonFiniteWeight { name: name.into(), index });
                }
                self.taken.insert(name.into());
                Ok(tensor)
            }
            Source::Random(rng) => Ok(random_tensor(rng, shape)),
        }
    }

    /// Numbers in all tensors that were taken.
    pub fn num_taken(&self) -> usize {
        self.num_taken
    }

    /// Checks that nobody has written to the files since they were mapped.
    ///
    /// # Errors
    /// [`Error::FileChanged`]: what was read of them cannot be trusted.
    pub fn check_files(&self) -> Result<()> {
        match &self.source {
            Source::Files(tensors) => tensors.values().try_for_each(Tensor::check_file),
            Source::Random(_) => Ok(()),
        }
    }

    /// Checks that nothing is left over but what `is_known_spare` knows of, and that the files
    /// stayed as they were while they were read.
    ///
    /// # Errors
    /// [`Error::UnexpectedTensor`] with the first name; [`Error::FileChanged`].
    pub fn finish(self, is_known_spare: impl Fn(&str) -> bool) -> Result<()> {
        self.check_files()?;
        let Source::Files(tensors) = &self.source else {
            return Ok(());
        };
        let is_left_over = |name: &&String| !self.taken.contains(*name) && !is_known_spare(name);
        match tensors.keys().find(is_left_over) {
            Some(name) => Err(Error::UnexpectedTensor { name: name.clone() }),
            None => Ok(()),
        }
    }
}

fn weight_files(folder: &Path) -> Result<Vec<PathBuf>> {
    #[derive(Deserialize)]
    struct Index {
        weight_map: BTreeMap<String, String>,
    }
    let index_path = folder.join("model.safetensors.index.json");
    if !index_path.exists() {
        return Ok(vec![folder.join("model.safetensors")]);
    }
    let text = std::fs::read(&index_path).map_err(|error| Error::io(&index_path, error))?;
    let bad = |reason: String| Error::WeightsFile { path: index_path.clone(), reason };
    let index: Index = serde_json::from_slice(&text).map_err(|error| bad(error.to_string()))?;
    let mut names: Vec<&String> = index.weight_map.values().collect();
    names.sort();
    names.dedup();
    let is_plain = |name: &str| Path::new(name).file_name().is_some_and(|file| file == name);
    if let Some(name) = names.iter().find(|name| !is_plain(name)) {
        return Err(bad(format!("{name:?} is not a file of this folder")));
    }
    Ok(names.into_iter().map(|name| folder.join(name)).collect())
}

/// Uniform numbers of standard deviation `1 / sqrt(columns)`, vectors around one, so that
/// activations neither vanish nor explode.
fn random_tensor(rng: &mut fastrand::Rng, shape: &[usize]) -> Tensor {
    let len = shape.iter().product();
    let mut values = Vec::with_capacity(len);
    match shape {
        [_] => values.extend((0..len).map(|_| 0.9 + 0.2 * rng.f32())),
        _ => {
            let spread = (3.0 / shape[shape.len() - 1] as f32).sqrt();
            values.extend((0..len).map(|_| spread * (2.0 * rng.f32() - 1.0)));
        }
    }
    Tensor::new(shape, values)
}
