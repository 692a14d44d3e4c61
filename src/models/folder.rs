//! A model folder: the configuration and the weights that belong together.

use std::path::{Path, PathBuf};

use serde_json::Value;

use super::config::{Config, ignored_by};
use super::family::Family;
use super::grid;
use super::score_network::scores_candidates;
use super::vector_network::gives_vectors;
use super::weights::{Weights, quantised};
use crate::checkpoint::adapter::Adapter;
use crate::checkpoint::keys::is_listed;
use crate::checkpoint::{Tensors, files};
use crate::error::{Error, Result};

/// Files that say how weights were quantised, beside those that say it in `config.json`.
const OF_QUANTISERS: [(&str, &str); 3] = [
    ("quantize_config.json", "GPTQ"),
    ("quant_config.json", "AWQ"),
    ("hf_quant_config.json", "ModelOpt"),
];

/// What a model folder holds.
#[derive(Clone)]
pub struct Checkpoint {
    /// `config.json`, with what an adapter changes of it.
    pub config: Config,
    /// The weights, an adapter merged.
    pub weights: Weights,
    /// What of the folder was not read, and why: for its owner.
    pub notes: Vec<String>,
}

impl Checkpoint {
    /// Opens a model folder, or a LoRA adapter's with its base: the folder `base`, else the path that
    /// `adapter_config.json` names, else a folder `base` inside the adapter's.
    ///
    /// # Errors
    /// [`Error::ModelFolder`] where files are missing; [`Error::Unsupported`] for networks and weights
    /// that are not served; [`Error::ModelConfig`]; [`Error::WeightsFile`]; the operating system's.
    pub fn open(folder: &Path, base: Option<&Path>) -> Result<Checkpoint> {
        check(folder)?;
        refuse_vectors(folder)?;
        let ignored = ignored_by(folder)?;
        let adapter = match Adapter::is_in(folder) && !is_listed(&ignored, "adapter_config.json") {
            true => Some(Adapter::open(folder, &|key| is_listed(&ignored, key))?),
            false => None,
        };
        let home = match (&adapter, base) {
            (Some(adapter), base) => base_of(folder, adapter, base)?,
            (None, Some(base)) => {
                let reason = format!(
                    "there is no adapter_config.json, so nothing is merged into the base {}; name \
                     the adapter's folder as the model",
                    base.display()
                );
                return Err(Error::ModelFolder { path: folder.to_path_buf(), reason });
            }
            (None, None) => folder.to_path_buf(),
        };
        let (mut config, mut tensors) = match grid_in(&home) {
            Some(tensors) => grid::to_t5(&home, tensors)?,
            None => (Config::read(&home.join("config.json"))?, Tensors::default()),
        };
        config.ignore(ignored.clone());
        let family = Family::of(&config)?;
        refuse_quantised(&home, &config)?;
        if adapter.is_none() && !is_listed(&ignored, "adapter_config.json") {
            refuse_stray_adapter(folder)?;
        }
        if tensors.floats.is_empty() {
            tensors = files::open_folder(&home)?;
        }
        if let Some(adapter) = adapter {
            let canonical = |name: &str| family.canonical_name(name);
            tensors.rename(&home, canonical)?;
            let tied = family.tied_names();
            if config.flag("tie_word_embeddings")?.unwrap_or(family.is_tied_by_default()) {
                let one = tied.iter().find_map(|name| tensors.floats.get(*name).cloned());
                for name in tied {
                    if let Some(one) = one.clone() {
                        tensors.floats.entry(name.to_string()).or_insert(one);
                    }
                }
            }
            adapter.merge(&mut tensors, &canonical, tied)?;
            let rows = tied.iter().find_map(|name| tensors.floats.get(*name)?.shape().first());
            if let Some(&rows) = rows {
                config.set("vocab_size", rows.into());
            }
            tensors.notes.push(format!("the adapter is merged into {}", home.display()));
        }
        let weights = Weights::of(tensors);
        let notes: Vec<String> = weights.notes().iter().cloned().chain(config.notes()).collect();
        for note in &notes {
            tracing::info!(target: "sidereal", note, "model folder");
        }
        Ok(Checkpoint { config, weights, notes })
    }

    /// The smallest `sidereal.json` that fits a folder of GRID's weights; `None` for other folders.
    ///
    /// # Errors
    /// [`Error::ModelFolder`] where the weights make no such network.
    pub fn layout_of_grid(folder: &Path) -> Result<Option<Value>> {
        grid_in(folder).map(|tensors| grid::layout(folder, tensors)).transpose()
    }
}

/// The weights of a folder without `config.json`, where they are GRID's.
fn grid_in(folder: &Path) -> Option<Tensors> {
    if folder.join("config.json").exists() {
        return None;
    }
    files::open_folder(folder).ok().filter(grid::is_grid)
}

/// The folder of an adapter's base.
fn base_of(folder: &Path, adapter: &Adapter, given: Option<&Path>) -> Result<PathBuf> {
    let is_model = |path: &Path| path.join("config.json").exists();
    let missing = |reason: String| Err(Error::ModelFolder { path: folder.to_path_buf(), reason });
    if let Some(given) = given {
        return match is_model(given) {
            true => Ok(given.to_path_buf()),
            false => missing(format!("the base {} has no config.json", given.display())),
        };
    }
    let named = adapter.base().unwrap_or_default();
    let candidates = [folder.join(named), folder.join("base")];
    let mut found = candidates.iter().filter(|path| !named.is_empty() || *path != folder);
    if let Some(found) = found.find(|path| is_model(path)) {
        return Ok(found.clone());
    }
    if is_model(folder) {
        return missing(format!(
            "weights and an adapter lie beside each other, and the adapter's base is {named:?}, \
             which is not here: where the weights are that base, write \
             \"base_model_name_or_path\": \".\" into adapter_config.json; where the adapter is \
             merged into them, remove it"
        ));
    }
    missing(format!(
        "this is a LoRA adapter, and its base {named:?} is not here: name the base's folder with \
         --base DIR, put it into this folder as \"base\", or merge the adapter in Python \
         (merge_and_unload, save_pretrained)"
    ))
}

/// Refuses a folder whose network gives vectors or scores: it has another door.
fn refuse_vectors(folder: &Path) -> Result<()> {
    if scores_candidates(folder)? {
        let reason = "its network scores candidates and writes no semantic IDs: `sidereal rank` and \
                      evaluate serve it, and Ranker of the library";
        return Err(Error::ModelFolder { path: folder.to_path_buf(), reason: reason.into() });
    }
    match gives_vectors(folder)? {
        false => Ok(()),
        true => Err(Error::ModelFolder {
            path: folder.to_path_buf(),
            reason:
                "its network gives vectors and writes no semantic IDs: `sidereal retrieve`, rank \
                     and evaluate serve it, and Retriever of the library"
                    .into(),
        }),
    }
}

/// Refuses an adapter's weights without the file that says what they are.
fn refuse_stray_adapter(folder: &Path) -> Result<()> {
    let names = files::file_names(folder)?;
    match names.iter().find(|name| name.starts_with("adapter_model.")) {
        Some(name) => Err(Error::ModelFolder {
            path: folder.to_path_buf(),
            reason: format!(
                "{name} is an adapter's weights, and adapter_config.json is missing: bring it, or \
                 move {name} away where it is merged into the model"
            ),
        }),
        None => Ok(()),
    }
}

/// Refuses weights that hold less than their numbers, by the name of what made them.
fn refuse_quantised(folder: &Path, config: &Config) -> Result<()> {
    for key in ["quantization_config", "compression_config", "quantization"] {
        if config.is_ignored(key) {
            continue;
        }
        if let Some(quantised_with) = config.object(key)? {
            let method = quantised_with.text("quant_method").unwrap_or("an unknown method");
            let format = quantised_with.text("format").or(quantised_with.text("fmt"));
            let format = format.map(|format| format!(", {format}")).unwrap_or_default();
            return Err(quantised(&format!("quantised with {method}{format}, by {key}")));
        }
    }
    for (name, method) in OF_QUANTISERS {
        if folder.join(name).exists() && !config.is_ignored(name) {
            return Err(quantised(&format!("quantised with {method}, by {name}")));
        }
    }
    Ok(())
}

/// Checks that a model folder is there.
///
/// # Errors
/// [`Error::ModelFolder`], with the way to a folder where the name looks like one of a hub.
fn check(folder: &Path) -> Result<()> {
    if folder.is_dir() {
        return Ok(());
    }
    let error = |reason: String| Err(Error::ModelFolder { path: folder.to_path_buf(), reason });
    if folder.exists() {
        return error("this is a file; name the folder that it is in".into());
    }
    match folder.to_str().filter(|name| is_hub_name(name)) {
        Some(name) => error(format!(
            "there is no such folder, and Sidereal downloads nothing; if this is a model of a hub, \
             fetch it by `hf download {name} --local-dir DIR` and name DIR"
        )),
        None => error("there is no such model folder".into()),
    }
}

/// Whether a name is of the form `owner/model`.
fn is_hub_name(name: &str) -> bool {
    let is_part = |part: &str| {
        !part.is_empty()
            && !part.starts_with('.')
            && part.chars().all(|c| c.is_ascii_alphanumeric() || "-_.".contains(c))
    };
    name.split_once('/').is_some_and(|(owner, model)| is_part(owner) && is_part(model))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_hub_name_is_told_so() {
        for (name, is_hub) in [
            ("Qwen/Qwen3-0.6B", true),
            ("models/missing/deeper", false),
            ("./missing", false),
            ("/missing", false),
            ("missing", false),
        ] {
            let error = check(Path::new(name)).expect_err("no such folder").to_string();
            assert_eq!(error.contains("hf download"), is_hub, "{error}");
        }
        assert!(
            check(Path::new("Cargo.toml")).is_err_and(|error| error.to_string().contains("file"))
        );
        assert!(check(Path::new("src")).is_ok());
    }
}
