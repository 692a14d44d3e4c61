//! Files of `torch.save`: `.bin`, `.pt`, `.pth`, `.ckpt`.
//!
//! Such a file is a zip archive with a pickle, `*/data.pkl`, and the numbers of each storage in a
//! file of its own, `*/data/KEY`, which are mapped and not copied. The pickle is a state dict, name to
//! tensor, or a dict of a trainer that holds one.

use std::cell::Cell;
use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

use half::{bf16, f16};

use super::pickle::{Pickle, TensorValue, Value};
use super::tensors::Tensors;
use super::zip;
use crate::error::{Error, Result};
use crate::mapping::Mapping;
use crate::tensor::{Dtype, Tensor};

/// Keys under which trainers put a model's state dict: Lightning, Hugging Face's examples, Meta's
/// research code, DeepSpeed, EAGER.
const STATE_DICT_KEYS: [&str; 6] =
    ["state_dict", "model_state_dict", "model", "model_parameters", "module", "net"];
/// How deep a state dict may lie in a trainer's dicts.
const MAX_DEPTH: usize = 3;
const LEGACY_MAGIC: &[u8] = &[0x80, 0x02, 0x8a, 0x0a, 0x6c, 0xfc, 0x9c, 0x46, 0xf9];

/// Maps a file.
///
/// # Errors
/// The operating system's; [`Error::WeightsFile`] where the file is damaged;
/// [`Error::Unsupported`] where it is sound and holds no state dict.
pub(crate) fn open(path: &Path) -> Result<Tensors> {
    let mapping = Arc::new(Mapping::open(path, 0)?);
    let bytes = mapping.bytes();
    let damaged = |reason: String| Error::WeightsFile { path: path.to_path_buf(), reason };
    if bytes.starts_with(LEGACY_MAGIC) || bytes.starts_with(&[0x80, 0x02, b'}']) {
        return Err(unsupported(path, "is in the format that torch wrote before version 1.6"));
    }
    if !bytes.starts_with(b"PK") {
        return Err(damaged("not a file of torch.save: it is no zip archive".into()));
    }
    let files = zip::files(bytes).map_err(damaged)?;
    let pickle = files.iter().find_map(|(name, range)| {
        let folder = name.strip_suffix("data.pkl")?;
        (folder.is_empty() || folder.ends_with('/')).then_some((folder, range))
    });
    let (folder, range) =
        pickle.ok_or_else(|| damaged("not a file of torch.save: no data.pkl is in it".into()))?;
    let order = files.get(&format!("{folder}byteorder")).map(|range| &bytes[range.clone()]);
    if order.is_some_and(|order| order.trim_ascii() != b"little") {
        return Err(unsupported(path, "has its numbers in big-endian order"));
    }
    let pickle = Pickle::read(&bytes[range.clone()]);
    let pickle =
        pickle.map_err(|reason| damaged(format!("its pickle cannot be read: {reason}")))?;
    let (entries, notes) = state_dict(&pickle, path)?;
    let budget = Cell::new(bytes.len());
    let archive = Archive { mapping: Arc::clone(&mapping), files: &files, folder, budget };
    let mut tensors = Tensors { notes, ..Tensors::default() };
    for (name, tensor) in entries {
        let read = archive.tensor(tensor);
        match read.map_err(|reason| damaged(format!("tensor {name:?} {reason}")))? {
            Ok(tensor) => drop(tensors.floats.insert(name.into(), tensor)),
            Err(dtype) => drop(tensors.others.insert(name.into(), dtype)),
        }
    }
    Ok(tensors)
}

fn unsupported(path: &Path, what: &str) -> Error {
    Error::Unsupported {
        what: format!("{}: a checkpoint that {what}", path.display()),
        way_out: format!(
            "save its state dict again, in Python: torch.save(torch.load({:?}, \
             weights_only=False), \"pytorch_model.bin\")",
            path.file_name().unwrap_or_default()
        ),
    }
}

type Entries<'a> = Vec<(&'a str, &'a TensorValue)>;

/// The state dict of a pickle, and what lies beside it, in words.
fn state_dict<'a>(pickle: &'a Pickle, path: &Path) -> Result<(Entries<'a>, Vec<String>)> {
    let file = path.file_name().unwrap_or_default().to_string_lossy();
    let mut dict = match pickle.root() {
        Value::Dict(entries) => entries,
        Value::Opaque(class) => {
            return Err(Error::Unsupported {
                what: format!("{}: a pickled object of {class}", path.display()),
                way_out: "save its state dict, in Python: torch.save(model.state_dict(), \
                          \"pytorch_model.bin\")"
                    .into(),
            });
        }
        _ => return Err(unsupported(path, "holds no state dict")),
    };
    let mut notes = Vec::new();
    for _ in 0..MAX_DEPTH {
        let entries = tensors_of(pickle, dict);
        if !entries.is_empty() {
            let num_others = dict.len().saturating_sub(entries.len());
            if num_others > 0 {
                notes.push(format!("{file}: {num_others} entries that are no tensors"));
            }
            return Ok((entries, notes));
        }
        let inner = dict.iter().filter_map(|(key, value)| {
            match (pickle.value(*key), pickle.value(*value)) {
                (Value::Text(key), Value::Dict(inner)) => Some((&**key, inner)),
                _ => None,
            }
        });
        let inner: Vec<_> = inner.collect();
        let known: Vec<_> = inner.iter().filter(|(key, _)| STATE_DICT_KEYS.contains(key)).collect();
        let (key, found) = match known[..] {
            [] => return Err(unsupported(path, "holds no state dict")),
            [only] => *only,
            [(first, _), (second, _), ..] => return Err(two_state_dicts(path, first, second)),
        };
        let names = |dict| -> BTreeSet<&str> {
            tensors_of(pickle, dict).into_iter().map(|(name, _)| name).collect()
        };
        let own = names(found);
        let twin = inner.iter().find(|(other, dict)| {
            *other != key && !own.is_empty() && names(dict).is_superset(&own)
        });
        if let Some((other, _)) = twin {
            return Err(two_state_dicts(path, key, other));
        }
        let others = dict.iter().filter_map(|(other, _)| match pickle.value(*other) {
            Value::Text(other) if &**other != key => Some(&**other),
            _ => None,
        });
        let others: Vec<&str> = others.collect();
        if !others.is_empty() {
            let others = others.join(", ");
            notes.push(format!("{file}: beside {key:?}, {others}: for training only"));
        }
        dict = found;
    }
    Err(unsupported(path, "holds no state dict"))
}

fn two_state_dicts(path: &Path, first: &str, second: &str) -> Error {
    let reason = format!(
        "{first:?} and {second:?} in it both hold the network's tensors; save the one that is meant \
         alone, in Python: torch.save(checkpoint[{first:?}], \"pytorch_model.bin\")"
    );
    Error::ModelConfig { path: path.to_path_buf(), reason }
}

fn tensors_of<'a>(pickle: &'a Pickle, dict: &[(u32, u32)]) -> Entries<'a> {
    let entries =
        dict.iter().filter_map(|&(key, value)| match (pickle.value(key), pickle.value(value)) {
            (Value::Text(name), Value::Tensor(tensor)) => Some((&**name, &**tensor)),
            _ => None,
        });
    // Of two entries of a name, the later counts, as in Python.
    let last: BTreeMap<&str, &TensorValue> = entries.collect();
    last.into_iter().collect()
}

struct Archive<'a> {
    mapping: Arc<Mapping>,
    files: &'a BTreeMap<String, Range<usize>>,
    folder: &'a str,
    /// Numbers that may still be copied, so that a small file cannot ask for much memory.
    budget: Cell<usize>,
}

impl Archive<'_> {
    /// The tensor, or the name of its number type where those are no floats; or what is wrong.
    fn tensor(
        &self,
        value: &TensorValue,
    ) -> std::result::Result<std::result::Result<Tensor, String>, String> {
        let named = value.dtype.as_ref().unwrap_or(&value.storage.class);
        let named = named.trim_start_matches("torch.").trim_end_matches("Storage");
        let (dtype, size) = match named {
            "Float" | "float32" => (Some(Dtype::F32), 4),
            "Half" | "float16" => (Some(Dtype::F16), 2),
            "BFloat16" | "bfloat16" => (Some(Dtype::Bf16), 2),
            "Double" | "float64" => (None, 8),
            other => return Ok(Err(other.to_string())),
        };
        let file = format!("{}data/{}", self.folder, value.storage.key);
        let range = self.files.get(&file);
        let range = range.ok_or_else(|| format!("has no numbers: {file} is missing"))?;
        let num_stored = range.len() / size;
        if (num_stored as u64) < value.storage.len {
            return Err(format!("is cut short: {num_stored} of {} numbers", value.storage.len));
        }
        let shape = shape_within(value, num_stored)?;
        let len = shape.iter().product::<usize>();
        if let (Some(dtype), true) = (dtype, is_dense(value)) {
            let start = range.start + if len == 0 { 0 } else { value.offset as usize * size };
            let bytes = start..start + len * size;
            return Ok(Ok(Tensor::mapped(&shape, Arc::clone(&self.mapping), bytes, dtype)));
        }
        let budget = self.budget.get().checked_sub(len);
        self.budget.set(budget.ok_or("and others show the same numbers too often")?);
        let stored = &self.mapping.bytes()[range.clone()];
        let number = |at: usize| -> f32 {
            let bytes = &stored[at * size..(at + 1) * size];
            match (dtype, bytes) {
                (Some(Dtype::F16), &[a, b]) => f16::from_le_bytes([a, b]).to_f32(),
                (Some(Dtype::Bf16), &[a, b]) => bf16::from_le_bytes([a, b]).to_f32(),
                (_, &[a, b, c, d]) => f32::from_le_bytes([a, b, c, d]),
                (_, bytes) => bytes.first_chunk().map_or(0.0, |b| f64::from_le_bytes(*b) as f32),
            }
        };
        let mut values = Vec::with_capacity(len);
        let mut index = vec![0u64; shape.len()];
        for _ in 0..len {
            let steps = index.iter().zip(&value.strides).map(|(at, stride)| at * stride);
            values.push(number((value.offset + steps.sum::<u64>()) as usize));
            for (at, &size) in index.iter_mut().zip(&value.shape).rev() {
                *at += 1;
                if *at < size {
                    break;
                }
                *at = 0;
            }
        }
        Ok(Ok(Tensor::new(&shape, values)))
    }
}

/// The shape of a view of `num_stored` numbers, which all its numbers lie in.
fn shape_within(value: &TensorValue, num_stored: usize) -> std::result::Result<Vec<usize>, String> {
    let shape = value.shape.iter().map(|&size| usize::try_from(size).ok());
    let shape: Vec<usize> = shape.collect::<Option<_>>().ok_or("has an impossible shape")?;
    let len = shape.iter().try_fold(1usize, |len, &size| len.checked_mul(size));
    // A view shows each number at most once, unless it was expanded, and weights are not.
    let len = len.filter(|&len| len <= num_stored);
    let len = len.ok_or_else(|| format!("has shape {shape:?} over {num_stored} numbers"))?;
    let last =
        value.shape.iter().zip(&value.strides).try_fold(value.offset, |last, (size, stride)| {
            last.checked_add(size.saturating_sub(1).checked_mul(*stride)?)
        });
    match last {
        _ if len == 0 => Ok(shape),
        Some(last) if last < num_stored as u64 => Ok(shape),
        _ => Err("reaches beyond its storage".into()),
    }
}

/// Whether a tensor's numbers follow one another row by row.
fn is_dense(value: &TensorValue) -> bool {
    let mut expected = 1;
    for (&size, &stride) in value.shape.iter().zip(&value.strides).rev() {
        if size > 1 && stride != expected {
            return false;
        }
        expected = expected.saturating_mul(size);
    }
    true
}
