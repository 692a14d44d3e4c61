//! Which files of a folder hold a checkpoint's weights.
//!
//! The order is that of transformers: `model.safetensors`, its index of shards, `pytorch_model.bin`,
//! its index. Where none of them is there, one file of another name may be. What lies beside the
//! chosen file is noted, so that nobody wonders which weights are served.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde::Deserialize;

use super::tensors::Tensors;
use super::{safetensors, torch};
use crate::error::{Error, Result};
use crate::json;

/// The names of a folder's weights, by which transformers finds them, first things first.
const NAMES: [&str; 4] = [
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
];
/// Files of a trainer's own state, by the starts of their names.
const STATE_OF_TRAINERS: [&str; 9] = [
    "training_args",
    "optimizer",
    "scheduler",
    "rng_state",
    "scaler",
    "random_states",
    "sampler",
    "dataloader",
    "trainer_state",
];
/// Starts of the names of heads that rate a text, which no recommendation asks for.
const VALUE_HEADS: [&str; 2] = ["value_head", "v_head"];
/// Files of weights in formats of other programs, by the ends of their names.
const OTHER_FORMATS: [(&str, &str); 7] = [
    (".gguf", "llama.cpp"),
    (".ggml", "llama.cpp"),
    (".h5", "TensorFlow"),
    (".msgpack", "Flax"),
    (".onnx", "ONNX"),
    (".npz", "NumPy"),
    (".distcp", "a distributed checkpoint of torch"),
];

/// Opens the weights of a folder.
///
/// # Errors
/// [`Error::ModelFolder`] where there are none, or several and no rule; the files' own.
pub(crate) fn open_folder(folder: &Path) -> Result<Tensors> {
    open_folder_without(folder, "")
}

/// Opens the weights of a folder in which a file of the name `other` holds something else.
///
/// # Errors
/// Those of [`open_folder`].
pub(crate) fn open_folder_without(folder: &Path, other: &str) -> Result<Tensors> {
    let present: Vec<&str> = NAMES.into_iter().filter(|name| folder.join(name).exists()).collect();
    let (mut tensors, chosen) = match present.first() {
        Some(name) if name.ends_with(".json") => (open_index(&folder.join(name))?, *name),
        Some(name) => (open_file(&folder.join(name))?, *name),
        None => {
            let name = only_file(folder, other)?;
            let mut tensors = open_file(&folder.join(&name))?;
            tensors.notes.push(format!("the weights are those of {name}"));
            return Ok(tensors);
        }
    };
    for spare in present.iter().filter(|&&name| name != chosen) {
        tensors.notes.push(format!("{spare} is not read: {chosen} goes before it"));
    }
    Ok(tensors)
}

/// Opens one file of weights, whose container its name tells.
///
/// # Errors
/// The operating system's; [`Error::WeightsFile`] where the file is damaged.
pub(crate) fn open_file(path: &Path) -> Result<Tensors> {
    match path.extension().and_then(|extension| extension.to_str()) {
        Some("bin" | "pt" | "pth" | "ckpt") => torch::open(path),
        _ => safetensors::open(path),
    }
}

/// Opens the files that an index lists.
fn open_index(path: &Path) -> Result<Tensors> {
    #[derive(Deserialize)]
    struct Index {
        weight_map: BTreeMap<String, String>,
    }
    let text = std::fs::read(path).map_err(|error| Error::io(path, error))?;
    let bad = |reason: String| Error::WeightsFile { path: path.to_path_buf(), reason };
    let index: Index = json::parse_bytes(&text).map_err(bad)?;
    let mut names: Vec<&String> = index.weight_map.values().collect();
    names.sort();
    names.dedup();
    let is_plain = |name: &str| Path::new(name).file_name().is_some_and(|file| file == name);
    if let Some(name) = names.iter().find(|name| !is_plain(name)) {
        return Err(bad(format!("{name:?} is not a file of this folder")));
    }
    let folder = path.parent().unwrap_or(Path::new(""));
    let mut tensors = Tensors::default();
    for name in names {
        let shard = folder.join(name);
        if !shard.exists() {
            return Err(bad(format!("lists {name:?}, which is not there")));
        }
        tensors.extend(open_file(&shard)?, &shard)?;
    }
    Ok(tensors)
}

/// The name of the one file of weights in a folder without a well-known one.
fn only_file(folder: &Path, other: &str) -> Result<String> {
    let names = file_names(folder)?;
    let missing = |reason: String| Err(Error::ModelFolder { path: folder.to_path_buf(), reason });
    let is_weights = |name: &&String| {
        let extension = Path::new(name).extension().and_then(|extension| extension.to_str());
        let is_other = STATE_OF_TRAINERS.iter().chain(&VALUE_HEADS).chain(&["adapter_model"]);
        matches!(extension, Some("safetensors" | "bin" | "pt" | "pth" | "ckpt"))
            && *name != other
            && !is_other.into_iter().any(|start| name.starts_with(start))
    };
    let found: Vec<&String> = names.iter().filter(is_weights).collect();
    match found[..] {
        [only] => return Ok(only.clone()),
        [] => {}
        _ if found.iter().all(|name| name.contains("-of-0")) => {
            return missing(format!(
                "the weights lie in {} files, and the index that lists them is missing: bring \
                 model.safetensors.index.json (or pytorch_model.bin.index.json)",
                found.len()
            ));
        }
        _ => {
            let found: Vec<&str> = found.into_iter().map(String::as_str).collect();
            return missing(format!(
                "several files could hold the weights ({}): rename the one that is meant to \
                 model.safetensors or pytorch_model.bin, or move the others away",
                found.join(", ")
            ));
        }
    }
    let other = names.iter().find_map(|name| {
        let (_, program) = OTHER_FORMATS.iter().find(|(end, _)| name.ends_with(end))?;
        Some((name, program))
    });
    match other {
        Some((name, program)) => missing(format!(
            "the weights lie in the format of {program} ({name}); safetensors and torch's files \
             are read: load the model in Python and call save_pretrained"
        )),
        None => missing(
            "there are no weights: model.safetensors, pytorch_model.bin, or one of their indices \
             with its shards, is looked for"
                .into(),
        ),
    }
}

/// The names of the files in a folder, in order.
///
/// # Errors
/// The operating system's.
pub(crate) fn file_names(folder: &Path) -> Result<Vec<String>> {
    let fail = |error| Error::io(folder, error);
    let mut names = Vec::new();
    for entry in std::fs::read_dir(folder).map_err(fail)? {
        let path: PathBuf = entry.map_err(fail)?.path();
        if path.is_file() {
            names.extend(path.file_name().map(|name| name.to_string_lossy().into_owned()));
        }
    }
    names.sort();
    Ok(names)
}
