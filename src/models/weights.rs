//! The weights of a checkpoint: every name, shape and number checked.

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::path::Path;

use crate::checkpoint::{Tensors, files};
use crate::error::{Error, Result};
use crate::tensor::{Dtype, Tensor};

/// Tensors that a network may hold once and show under several names. Whoever replaces one of
/// several that are equal replaces them all.
const EMBEDDINGS: [&str; 5] = [
    "shared.weight",
    "encoder.embed_tokens.weight",
    "decoder.embed_tokens.weight",
    "model.embed_tokens.weight",
    "lm_head.weight",
];
/// Ends of the names of tensors that belong to quantised weights.
const OF_QUANTISED: [&str; 11] = [
    ".qweight",
    ".qzeros",
    ".g_idx",
    ".scales",
    ".weight_scale",
    ".weight_scale_inv",
    ".weight_packed",
    ".absmax",
    ".quant_map",
    ".SCB",
    ".weight_zero_point",
];
/// Number types that only quantised weights have, by the starts of their names.
const QUANTISED_TYPES: [&str; 4] = ["F8", "F4", "F6", "float8"];

/// The tensors of a checkpoint, each to be taken once.
#[derive(Clone)]
pub struct Weights {
    source: Source,
    taken: HashSet<String>,
    num_taken: usize,
}

#[derive(Clone)]
enum Source {
    Files(Tensors),
    /// Whatever is asked for, at random: for benchmarks of a shape.
    Random(fastrand::Rng),
}

impl Weights {
    /// Opens the weights of a Hugging Face folder: safetensors or torch's files, in shards or not.
    ///
    /// A network that is loaded has copies of its weights. The files are read again where some of
    /// the weights are replaced, and must not have been written to until then.
    ///
    /// # Errors
    /// The operating system's; [`Error::ModelFolder`] where there are none or several;
    /// [`Error::WeightsFile`] where a file is damaged.
    pub fn open(folder: &Path) -> Result<Weights> {
        Ok(Weights::of(files::open_folder(folder)?))
    }

    /// Opens the weights of a folder in which a file of this name holds something else.
    ///
    /// # Errors
    /// As [`open`](Weights::open).
    pub(crate) fn open_beside(folder: &Path, other: &str) -> Result<Weights> {
        Ok(Weights::of(files::open_folder_without(folder, other)?))
    }

    /// Opens one file: safetensors, or what `torch.save` wrote (`.bin`, `.pt`, `.pth`, `.ckpt`).
    ///
    /// # Errors
    /// As [`open`](Weights::open).
    pub fn open_file(path: &Path) -> Result<Weights> {
        Ok(Weights::of(files::open_file(path)?))
    }

    pub(super) fn of(tensors: Tensors) -> Weights {
        Weights { source: Source::Files(tensors), taken: HashSet::new(), num_taken: 0 }
    }

    /// Weights drawn at random, of whatever names and shapes a network asks for.
    pub fn random(seed: u64) -> Weights {
        let rng = fastrand::Rng::with_seed(seed);
        Weights { source: Source::Random(rng), taken: HashSet::new(), num_taken: 0 }
    }

    /// Weights in memory.
    pub fn from_tensors(tensors: impl IntoIterator<Item = (String, Tensor)>) -> Weights {
        Weights::of(Tensors { floats: tensors.into_iter().collect(), ..Tensors::default() })
    }

    /// Puts other tensors in the place of those of the same names and shapes. Embeddings and heads
    /// that are one tensor under several names stay one.
    ///
    /// # Errors
    /// [`Error::UnexpectedTensor`], [`Error::TensorShape`]; nothing was replaced then.
    pub fn replace(&mut self, tensors: Vec<(String, Tensor)>) -> Result<()> {
        let Source::Files(Tensors { floats: own, .. }) = &mut self.source else {
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
        let given: BTreeSet<&str> = tensors.iter().map(|(name, _)| name.as_str()).collect();
        let mut twins = Vec::new();
        for (name, tensor) in tensors.iter().filter(|(name, _)| is_embedding(name)) {
            let names = own.keys().filter(|other| is_embedding(other));
            for other in names.filter(|other| !given.contains(other.as_str())) {
                if own[other].is_equal(&own[name]) {
                    twins.push((other.clone(), tensor.clone()));
                }
            }
        }
        own.extend(twins);
        own.extend(tensors);
        Ok(())
    }

    /// The names and shapes of all tensors.
    pub fn shapes(&self) -> Vec<(String, Vec<usize>)> {
        match &self.source {
            Source::Files(Tensors { floats, .. }) => {
                let shape =
                    |(name, tensor): (&String, &Tensor)| (name.clone(), tensor.shape().to_vec());
                floats.iter().map(shape).collect()
            }
            Source::Random(_) => Vec::new(),
        }
    }

    /// The number type that most of the numbers are stored in.
    pub fn dtype(&self) -> Dtype {
        let Source::Files(Tensors { floats, .. }) = &self.source else { return Dtype::F32 };
        let numbers = |dtype: Dtype| {
            let of_dtype = floats.values().filter(|tensor| tensor.dtype() == dtype);
            of_dtype.map(Tensor::len).sum::<usize>()
        };
        let dtypes = [Dtype::F16, Dtype::Bf16, Dtype::F32];
        dtypes.into_iter().max_by_key(|&dtype| numbers(dtype)).unwrap_or(Dtype::F32)
    }

    /// What the files hold besides and nobody reads.
    pub fn notes(&self) -> &[String] {
        match &self.source {
            Source::Files(Tensors { notes, .. }) => notes,
            Source::Random(_) => &[],
        }
    }

    /// The rows of a tensor, where the checkpoint has it.
    pub(super) fn num_rows(&self, name: &str) -> Option<usize> {
        match &self.source {
            Source::Files(Tensors { floats, .. }) => floats.get(name)?.shape().first().copied(),
            Source::Random(_) => None,
        }
    }

    /// The shape of a matrix, where the checkpoint has one of this name.
    pub(super) fn matrix_shape_of(&self, name: &str) -> Option<[usize; 2]> {
        match &self.source {
            Source::Files(Tensors { floats, .. }) => floats.get(name)?.shape().try_into().ok(),
            Source::Random(_) => None,
        }
    }

    /// Whether the checkpoint has a tensor of this name.
    pub fn contains(&self, name: &str) -> bool {
        match &self.source {
            Source::Files(Tensors { floats, .. }) => floats.contains_key(name),
            Source::Random(_) => false,
        }
    }

    /// Gives every tensor the name that `rename` makes of its own.
    pub(super) fn rename(&mut self, path: &Path, rename: impl Fn(&str) -> String) -> Result<()> {
        match &mut self.source {
            Source::Files(tensors) => tensors.rename(path, rename),
            Source::Random(_) => Ok(()),
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
            Source::Files(Tensors { floats, others, .. }) => {
                let Some(tensor) = floats.get(name).cloned() else {
                    return Err(missing(name, floats, others, &self.taken));
                };
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

    /// One tensor under several names: of each name its own tensor, where the checkpoint has one that
    /// differs from the first, else the first. Any of the names may be the one that is there.
    ///
    /// # Errors
    /// Those of [`take`](Weights::take).
    pub fn take_tied(&mut self, names: &[&str], shape: &[usize]) -> Result<Vec<Tensor>> {
        let first = names.iter().find(|name| self.contains(name)).unwrap_or(&names[0]);
        let source = self.take(first, shape)?;
        let of_name = |name: &&str| {
            if name == first || !self.contains(name) {
                return Ok(source.clone());
            }
            let own = self.take(name, shape)?;
            if own.is_equal(&source) {
                self.num_taken -= own.len();
                return Ok(source.clone());
            }
            Ok(own)
        };
        names.iter().map(of_name).collect()
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
            Source::Files(tensors) => tensors.floats.values().try_for_each(Tensor::check_file),
            Source::Random(_) => Ok(()),
        }
    }

    /// Checks that nothing is left over but what `is_spare` knows to change nothing, and that the
    /// files stayed as they were while they were read.
    ///
    /// # Errors
    /// [`Error::UnexpectedTensor`] with the first name; [`Error::Unsupported`] for weights that are
    /// quantised or of a number type that cannot be read; [`Error::FileChanged`].
    pub fn finish(self, is_spare: impl Fn(&str, &Tensor) -> bool) -> Result<()> {
        self.check_files()?;
        let Source::Files(Tensors { floats, others, .. }) = &self.source else {
            return Ok(());
        };
        let is_left_over = |(name, tensor): &(&String, &Tensor)| {
            !self.taken.contains(*name) && !is_spare(name, tensor)
        };
        if let Some((name, _)) = floats.iter().find(is_left_over) {
            return Err(match of_quantised(name) {
                true => quantised(&format!("the checkpoint has a tensor {name:?}")),
                false => Error::UnexpectedTensor { name: name.clone() },
            });
        }
        let nothing = Tensor::new(&[0], Vec::new());
        match others.iter().find(|(name, _)| !is_spare(name, &nothing)) {
            Some((name, dtype)) => Err(unreadable(name, dtype)),
            None => Ok(()),
        }
    }
}

fn is_embedding(name: &str) -> bool {
    EMBEDDINGS.contains(&name)
}

fn of_quantised(name: &str) -> bool {
    OF_QUANTISED.iter().any(|end| name.ends_with(end))
}

/// The error for weights that hold less than their numbers.
pub(super) fn quantised(what: &str) -> Error {
    Error::Unsupported {
        what: format!("a quantised checkpoint ({what})"),
        way_out: "serve the checkpoint that it was made from, in f32, f16 or bf16".into(),
    }
}

fn unreadable(name: &str, dtype: &str) -> Error {
    if QUANTISED_TYPES.iter().any(|start| dtype.starts_with(start)) {
        return quantised(&format!("tensor {name:?} is {dtype}"));
    }
    Error::Unsupported {
        what: format!("tensor {name:?} of the number type {dtype}"),
        way_out: format!(
            "f32, f16, bf16 and f64 are read; where it changes no answer, list it in \
             sidereal.json: \"ignore\": [{name:?}]"
        ),
    }
}

/// The error for a tensor that is not there, with what stands in its place.
fn missing(
    name: &str,
    floats: &BTreeMap<String, Tensor>,
    others: &BTreeMap<String, String>,
    taken: &HashSet<String>,
) -> Error {
    if let Some(dtype) = others.get(name) {
        return unreadable(name, dtype);
    }
    let module = name.trim_end_matches("weight");
    let of_module = floats.keys().chain(others.keys()).filter(|other| other.starts_with(module));
    if let Some(other) = of_module.clone().find(|other| of_quantised(other)) {
        return quantised(&format!("{other:?} stands in the place of {name:?}"));
    }
    if let Some(other) = floats.keys().find(|other| other.contains(".lora_A")) {
        return Error::Unsupported {
            what: format!("a checkpoint with an adapter inside ({other:?})"),
            way_out: "merge it in Python, model.merge_and_unload().save_pretrained(...)".into(),
        };
    }
    let left = floats.keys().filter(|other| !taken.contains(*other));
    let distance = |other: &&String| strsim::levenshtein(name, other);
    let nearest = left.min_by_key(distance).filter(|other| distance(other) <= name.len() / 2);
    let mut hint = String::new();
    if let Some(nearest) = nearest {
        hint += &format!("; the nearest that it has is {nearest:?}");
    }
    if name == "lm_head.weight" {
        hint += "; where the head is the embedding, say so in config.json: \
                 \"tie_word_embeddings\": true";
    }
    Error::MissingTensor { name: name.into(), hint }
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
