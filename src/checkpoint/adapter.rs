//! LoRA adapters of peft, merged into the weights that they were trained beside (Hu et al. 2021).
//!
//! A layer `W` with an adapter computes `W x + scale * B (A x)`, so its weights are
//! `W + scale * B A`, computed in f32. The scale is `alpha / r`, or `alpha / sqrt(r)` with
//! `use_rslora` (Kalajdzievski 2023). An adapter may also hold whole tensors, which take the place of
//! the base's: those of `modules_to_save`, biases, and embeddings that grew.
//!
//! `fan_in_fan_out` has no effect: it is for layers that store their weights transposed, which no
//! network here has, and peft passes it over for all others.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use rayon::prelude::*;
use serde_json::{Map, Value};

use super::files;
use super::keys::says_nothing;
use super::tensors::Tensors;
use crate::error::{Error, Result};
use crate::json;
use crate::tensor::Tensor;

const CONFIG: &str = "adapter_config.json";
/// The names of an adapter's weights, first things first.
const WEIGHTS: [&str; 2] = ["adapter_model.safetensors", "adapter_model.bin"];
/// What peft writes before the base's own names.
const WRAPPER: &str = "base_model.model.";

/// Keys that say where and how an adapter was trained, not what it computes: which layers it changes
/// is read off its tensors.
const WITHOUT_EFFECT: [&str; 27] = [
    "auto_mapping",
    "base_model_name_or_path",
    "bias",
    "corda_config",
    "ensure_weight_tying",
    "eva_config",
    "exclude_modules",
    "fan_in_fan_out",
    "inference_mode",
    "init_lora_weights",
    "layers_pattern",
    "layers_to_transform",
    "loftq_config",
    "lora_alpha",
    "lora_dropout",
    "lora_ga_config",
    "modules_to_save",
    "peft_type",
    "peft_version",
    "qalora_group_size",
    "r",
    "rank_pattern",
    "alpha_pattern",
    "revision",
    "runtime_config",
    "target_modules",
    "task_type",
];
/// Ways to start a training that change the base's weights as well: an adapter saved as it is then
/// belongs to a base that nobody has.
const STARTS_THAT_CHANGE_THE_BASE: [&str; 5] = ["pissa", "olora", "corda", "loftq", "lora_ga"];

/// An adapter: its configuration and tensors.
pub(crate) struct Adapter {
    path: PathBuf,
    keys: Map<String, Value>,
    tensors: Tensors,
}

/// The two factors of a layer's change.
#[derive(Default)]
struct Factors {
    /// `[r, in]`
    a: Option<Tensor>,
    /// `[out, r]`
    b: Option<Tensor>,
    /// The factors are those of an embedding, whose weights are `[tokens, width]`: transposed.
    is_embedding: bool,
}

impl Adapter {
    /// Whether a folder holds an adapter.
    pub fn is_in(folder: &Path) -> bool {
        folder.join(CONFIG).exists()
    }

    /// Opens the adapter of a folder. `is_ignored` says which keys its owner wants passed over.
    ///
    /// # Errors
    /// [`Error::Unsupported`] for another kind than LoRA, or a key whose effect is not served; the
    /// files' own.
    pub fn open(folder: &Path, is_ignored: &dyn Fn(&str) -> bool) -> Result<Adapter> {
        let path = folder.join(CONFIG);
        let text = std::fs::read(&path).map_err(|error| Error::io(&path, error))?;
        let keys: Map<String, Value> = json::parse_bytes(&text)
            .map_err(|reason| Error::ModelConfig { path: path.clone(), reason })?;
        let adapter = Adapter { path, keys, tensors: Tensors::default() };
        adapter.check(is_ignored)?;
        let name = WEIGHTS.into_iter().find(|name| folder.join(name).exists());
        let name = name.ok_or_else(|| Error::ModelFolder {
            path: folder.to_path_buf(),
            reason: format!("{CONFIG} is there, but neither {} nor {}", WEIGHTS[0], WEIGHTS[1]),
        })?;
        Ok(Adapter { tensors: files::open_file(&folder.join(name))?, ..adapter })
    }

    /// The base that the adapter names: a path, or a name on a hub.
    pub fn base(&self) -> Option<&str> {
        self.keys.get("base_model_name_or_path").and_then(Value::as_str)
    }

    /// Refuses what would give wrong answers if it were passed over.
    fn check(&self, is_ignored: &dyn Fn(&str) -> bool) -> Result<()> {
        let kind = self.keys.get("peft_type").and_then(Value::as_str).unwrap_or("nothing");
        if kind != "LORA" {
            return Err(self.unsupported(format!("an adapter of the type {kind}")));
        }
        if self.flag("use_dora") {
            return Err(self.unsupported("a DoRA adapter (use_dora)".into()));
        }
        let start = self.keys.get("init_lora_weights").and_then(Value::as_str).unwrap_or_default();
        let start = start.to_lowercase();
        let changes_base = STARTS_THAT_CHANGE_THE_BASE.iter().any(|name| start.starts_with(name));
        if changes_base && !is_ignored("init_lora_weights") {
            return Err(self.unsupported(format!(
                "init_lora_weights {start:?}, which changed the base's weights before training"
            )));
        }
        for (key, value) in &self.keys {
            let is_known = WITHOUT_EFFECT.contains(&key.as_str()) || key == "use_rslora";
            if !is_known && !says_nothing(value) && !is_ignored(key) {
                return Err(Error::ModelConfig {
                    path: self.path.clone(),
                    reason: format!(
                        "{key:?} is {value}, and this version does not know what it changes; merge \
                         the adapter in Python (merge_and_unload, save_pretrained), or, where it \
                         changes no answer, list it in sidereal.json: \"ignore\": [{key:?}]"
                    ),
                });
            }
        }
        Ok(())
    }

    fn unsupported(&self, what: String) -> Error {
        Error::Unsupported {
            what: format!("{}: {what}", self.path.display()),
            way_out:
                "merge it in Python, model.merge_and_unload().save_pretrained(...), and serve \
                      the merged folder"
                    .into(),
        }
    }

    fn bad(&self, reason: String) -> Error {
        Error::ModelConfig { path: self.path.clone(), reason }
    }

    fn flag(&self, key: &str) -> bool {
        self.keys.get(key).and_then(Value::as_bool).unwrap_or(false)
    }

    /// Merges the adapter into `base`. `canonical` gives the network's own name of a tensor; names
    /// of `tied` tensors, of which `base` has all, follow one that grew.
    ///
    /// # Errors
    /// [`Error::ModelConfig`] where a tensor of the adapter has no place in the base.
    pub fn merge(
        mut self,
        base: &mut Tensors,
        canonical: &dyn Fn(&str) -> String,
        tied: &[&str],
    ) -> Result<()> {
        let mut factors: BTreeMap<String, Factors> = BTreeMap::new();
        let mut whole: BTreeMap<String, Tensor> = BTreeMap::new();
        for (name, tensor) in std::mem::take(&mut self.tensors.floats) {
            self.sort(&name, tensor, &mut factors, &mut whole)?;
        }
        if let Some((name, dtype)) = self.tensors.others.first_key_value() {
            return Err(self.bad(format!("tensor {name:?} is {dtype}; floats are merged")));
        }
        if factors.is_empty() && whole.is_empty() {
            return Err(self.bad("the adapter's weights hold no tensor".into()));
        }
        let whole: BTreeMap<String, Tensor> =
            whole.into_iter().map(|(name, tensor)| (canonical(&name), tensor)).collect();
        self.refuse_partial(base, &factors, &whole, canonical, tied)?;
        self.replace(base, whole, tied)?;
        for (module, factors) in factors {
            let name = canonical(&format!("{module}.weight"));
            let before = base.floats.get(&name).ok_or_else(|| {
                self.bad(format!("the adapter changes {name:?}, which the base does not have"))
            })?;
            let merged = self.merged(&module, before, &factors)?;
            base.floats.insert(name, merged);
        }
        base.notes.append(&mut self.tensors.notes);
        Ok(())
    }

    /// Puts a tensor of the adapter to the factors of its module or to the whole tensors.
    fn sort(
        &self,
        name: &str,
        tensor: Tensor,
        factors: &mut BTreeMap<String, Factors>,
        whole: &mut BTreeMap<String, Tensor>,
    ) -> Result<()> {
        let own = name.strip_prefix(WRAPPER).unwrap_or(name);
        let parts: Vec<&str> = own.split('.').collect();
        let marks = [
            "lora_A",
            "lora_B",
            "lora_embedding_A",
            "lora_embedding_B",
            "modules_to_save",
            "original_module",
            "base_layer",
            "lora_magnitude_vector",
            "token_adapter",
        ];
        let Some(at) = parts.iter().position(|part| marks.contains(part)) else {
            if own.contains("lora_") || own.contains("ranknum") {
                return Err(self.unsupported(format!("tensor {name:?}")));
            }
            whole.insert(own.into(), tensor);
            return Ok(());
        };
        let (module, mark) = (parts[..at].join("."), parts[at]);
        let last = parts[parts.len() - 1];
        match mark {
            "lora_A" | "lora_B" if last == "bias" => {
                return Err(
                    self.unsupported("an adapter with biases of its own (lora_bias)".into())
                );
            }
            "lora_A" => factors.entry(module).or_default().a = Some(tensor),
            "lora_B" => factors.entry(module).or_default().b = Some(tensor),
            "lora_embedding_A" | "lora_embedding_B" => {
                let factors = factors.entry(module).or_default();
                factors.is_embedding = true;
                match mark {
                    "lora_embedding_A" => factors.a = Some(tensor),
                    _ => factors.b = Some(tensor),
                }
            }
            "modules_to_save" | "base_layer" => {
                drop(whole.insert(format!("{module}.{last}"), tensor));
            }
            // The base's own, which modules_to_save stands for.
            "original_module" => {}
            "lora_magnitude_vector" => return Err(self.unsupported("a DoRA adapter".into())),
            _ => {
                let what = "an adapter of single tokens (trainable_token_indices)";
                return Err(self.unsupported(what.into()));
            }
        }
        Ok(())
    }

    /// Refuses an adapter that changes one of several names of an encoder-decoder's embedding and
    /// leaves the others: which of them its training read depends on the program's version.
    fn refuse_partial(
        &self,
        base: &Tensors,
        factors: &BTreeMap<String, Factors>,
        whole: &BTreeMap<String, Tensor>,
        canonical: &dyn Fn(&str) -> String,
        tied: &[&str],
    ) -> Result<()> {
        let (_, embeddings) = tied.split_last().unwrap_or((&"", &[]));
        let changed: BTreeSet<String> =
            factors.keys().map(|module| canonical(&format!("{module}.weight"))).collect();
        let keeps_shape = |name: &str| {
            whole.get(name).is_some_and(|tensor| {
                base.floats.get(name).is_some_and(|before| before.shape() == tensor.shape())
            })
        };
        let is_changed = |name: &&&str| changed.contains(**name) || keeps_shape(name);
        let found = embeddings.iter().find(is_changed);
        match found.filter(|_| !embeddings.iter().all(|name| is_changed(&name))) {
            Some(name) => Err(self.unsupported(format!(
                "an adapter of {name:?} alone, one of the names of one embedding"
            ))),
            None => Ok(()),
        }
    }

    /// Puts whole tensors in the place of the base's. Only embeddings and heads may grow.
    fn replace(
        &self,
        base: &mut Tensors,
        whole: BTreeMap<String, Tensor>,
        tied: &[&str],
    ) -> Result<()> {
        let mut grown = None;
        for (name, tensor) in &whole {
            let before = base.floats.get(name).ok_or_else(|| {
                self.bad(format!("the adapter brings {name:?}, which the base does not have"))
            })?;
            let (old, new) = (before.shape(), tensor.shape());
            if old == new {
                continue;
            }
            let has_grown = old.len() == 2 && new.len() == 2 && old[1] == new[1];
            if !has_grown || !tied.contains(&name.as_str()) {
                return Err(self.bad(format!(
                    "the adapter brings {name:?} with shape {new:?}, the base has {old:?}: is it \
                     another base's?"
                )));
            }
            grown = Some(tensor.clone());
        }
        // Tied tensors are one: where one grew, its twins that the adapter does not bring grew too.
        let names: BTreeSet<&str> = tied.iter().copied().collect();
        if let Some(grown) = grown {
            let rows = grown.shape()[0];
            for name in names.iter().filter(|&&name| !whole.contains_key(name)) {
                if let Some(twin) =
                    base.floats.get_mut(*name).filter(|twin| twin.shape()[0] != rows)
                {
                    *twin = grown.clone();
                }
            }
        }
        base.floats.extend(whole);
        Ok(())
    }

    /// A layer's weights with its change.
    fn merged(&self, module: &str, before: &Tensor, factors: &Factors) -> Result<Tensor> {
        let (Some(a), Some(b)) = (&factors.a, &factors.b) else {
            return Err(self.bad(format!("{module:?} has one of the two LoRA factors only")));
        };
        let wrong = || {
            self.bad(format!(
                "the factors of {module:?} have shapes {:?} and {:?}, its weights {:?}: is it \
                 another base's?",
                a.shape(),
                b.shape(),
                before.shape()
            ))
        };
        let (&[rank, num_in], &[num_out, b_rank]) = (a.shape(), b.shape()) else {
            return Err(wrong());
        };
        let expected = if factors.is_embedding { [num_in, num_out] } else { [num_out, num_in] };
        if rank == 0 || b_rank != rank || before.shape() != expected {
            return Err(wrong());
        }
        let scale = self.scale(module, rank)?;
        // The change is a product, `factors` of shape [rows, rank] by `sources` [rank, width].
        let (a, b) = (a.to_vec(), b.to_vec());
        let (factors, sources) = match factors.is_embedding {
            false => (b, a),
            true => (transposed(&a, num_in), transposed(&b, rank)),
        };
        let width = expected[1];
        let mut values = before.to_vec();
        values.par_chunks_mut(width.max(1)).enumerate().for_each(|(row, values)| {
            let mut change = vec![0.0f32; width];
            for k in 0..rank {
                let factor = factors[row * rank + k];
                let source = &sources[k * width..(k + 1) * width];
                change.iter_mut().zip(source).for_each(|(sum, x)| *sum += factor * x);
            }
            values.iter_mut().zip(&change).for_each(|(value, change)| *value += scale * change);
        });
        Ok(Tensor::new(&expected, values))
    }

    /// What a module's change is multiplied by.
    fn scale(&self, module: &str, rank: usize) -> Result<f32> {
        let by_config = self.number_for("r", "rank_pattern", module)?.unwrap_or(rank as f64);
        if by_config != rank as f64 {
            return Err(self.bad(format!(
                "the factors of {module:?} have rank {rank}, the configuration says {by_config}"
            )));
        }
        let alpha = self.number_for("lora_alpha", "alpha_pattern", module)?.ok_or_else(|| {
            self.bad("\"lora_alpha\" is missing, without which the change has no scale".into())
        })?;
        let rank = rank as f64;
        Ok((alpha / if self.flag("use_rslora") { rank.sqrt() } else { rank }) as f32)
    }

    /// The number of a key, or that of the first pattern which a module's name ends in.
    fn number_for(&self, key: &str, patterns: &str, module: &str) -> Result<Option<f64>> {
        let bad = |key: &str, value: &Value| self.bad(format!("{key:?} is {value}, not a number"));
        let number = |key: &str, value: &Value| {
            let number = value.as_f64().filter(|number| (*number as f32).is_finite());
            number.ok_or_else(|| bad(key, value))
        };
        let patterns = match self.keys.get(patterns) {
            None | Some(Value::Null) => None,
            Some(Value::Object(entries)) => Some(entries),
            Some(other) => return Err(self.bad(format!("{patterns:?} is {other}, not an object"))),
        };
        let mut found: Option<(&str, f64)> = None;
        for (pattern, value) in patterns.into_iter().flatten() {
            let is_plain = |c: char| c.is_alphanumeric() || c == '_' || c == '.';
            let name = pattern.trim_start_matches('^').trim_end_matches('$').replace("\\.", ".");
            if !name.chars().all(is_plain) {
                return Err(self.unsupported(format!("the regular expression {pattern:?}")));
            }
            let before = module.strip_suffix(name.as_str());
            let is_anchored = pattern.starts_with('^');
            if before
                .is_some_and(|before| before.is_empty() || !is_anchored && before.ends_with('.'))
            {
                let value = number(pattern, value)?;
                match found {
                    Some((first, other)) if other != value => {
                        return Err(
                            self.bad(format!("{first:?} and {pattern:?} both name {module:?}"))
                        );
                    }
                    _ => found = Some((pattern, value)),
                }
            }
        }
        if let Some((_, value)) = found {
            return Ok(Some(value));
        }
        match self.keys.get(key) {
            None | Some(Value::Null) => Ok(None),
            Some(value) => Ok(Some(number(key, value)?)),
        }
    }
}

/// A matrix, row by row, of so many columns; its transpose.
fn transposed(matrix: &[f32], num_columns: usize) -> Vec<f32> {
    let column = |at: usize| matrix.iter().skip(at).step_by(num_columns).copied();
    (0..num_columns).flat_map(column).collect()
}
