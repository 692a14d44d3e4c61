//! `config.json` and `sidereal.json`: what a model folder says of itself.

use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use serde::Deserialize;
use serde_json::{Map, Value};

use super::layout::{self, LevelEntry};
use super::vocabulary::Vocabulary;
use crate::backend::NO_TOKEN;
use crate::catalog::Catalog;
use crate::error::{Error, Result};
pub use crate::prompt::Prompt;
use crate::prompt::{PromptEntry, Text, TokensEntry, projects};
use crate::request::Forced;
use crate::search::Normalization;

/// The largest size of any dimension that a configuration may give; guards the arithmetic.
const MAX_DIMENSION: u64 = 1 << 24;

/// A `config.json` in the layout of Hugging Face, asked key by key.
#[derive(Clone)]
pub struct Config {
    path: PathBuf,
    keys: Map<String, Value>,
}

impl Config {
    /// Reads a file.
    ///
    /// # Errors
    /// The operating system's, or [`Error::ModelConfig`] where it is no JSON object.
    pub fn read(path: &Path) -> Result<Config> {
        Ok(Config { path: path.to_path_buf(), keys: read_json(path)? })
    }

    /// A configuration in memory; `path` stands in its errors.
    pub fn new(path: &Path, keys: Map<String, Value>) -> Config {
        Config { path: path.to_path_buf(), keys }
    }

    /// An error about this file.
    pub fn error(&self, reason: String) -> Error {
        Error::ModelConfig { path: self.path.clone(), reason }
    }

    /// The network that the checkpoint is for, as `T5ForConditionalGeneration`.
    pub fn architecture(&self) -> Result<&str> {
        let first = self.keys.get("architectures").and_then(|names| names.get(0));
        first.and_then(Value::as_str).ok_or_else(|| {
            self.error("\"architectures\" must name the network, as in Hugging Face's files".into())
        })
    }

    /// A positive whole number.
    pub fn size(&self, key: &str) -> Result<usize> {
        self.size_if_given(key)?.ok_or_else(|| self.error(format!("{key:?} is missing")))
    }

    /// A positive whole number with a default.
    pub fn size_or(&self, key: &str, default: usize) -> Result<usize> {
        Ok(self.size_if_given(key)?.unwrap_or(default))
    }

    fn size_if_given(&self, key: &str) -> Result<Option<usize>> {
        let Some(value) = self.given(key) else {
            return Ok(None);
        };
        match value.as_u64() {
            Some(size @ 1..=MAX_DIMENSION) => Ok(Some(size as usize)),
            _ => Err(self.error(format!(
                "{key:?} is {value}, not a whole number between 1 and {MAX_DIMENSION}"
            ))),
        }
    }

    /// A token of a vocabulary of `vocab_size`, with a default.
    pub fn token_or(&self, key: &str, vocab_size: usize, default: u32) -> Result<u32> {
        let Some(value) = self.given(key) else {
            return Ok(default);
        };
        match value.as_u64() {
            Some(token) if token < vocab_size as u64 => Ok(token as u32),
            _ => Err(self.error(format!("{key:?} is {value}, not a token below {vocab_size}"))),
        }
    }

    /// A positive number with a default.
    pub fn number_or(&self, key: &str, default: f64) -> Result<f64> {
        positive_number(&self.keys, key).map(|found| found.unwrap_or(default)).map_err(|value| {
            self.error(format!("{key:?} is {value}, not a number above zero that f32 can hold"))
        })
    }

    /// A yes or no, where given.
    pub fn flag(&self, key: &str) -> Result<Option<bool>> {
        let Some(value) = self.given(key) else {
            return Ok(None);
        };
        let flag = value.as_bool();
        flag.map(Some).ok_or_else(|| self.error(format!("{key:?} is {value}, not true or false")))
    }

    /// A text with a default.
    pub fn text_or<'a>(&'a self, key: &str, default: &'a str) -> Result<&'a str> {
        let Some(value) = self.given(key) else {
            return Ok(default);
        };
        value.as_str().ok_or_else(|| self.error(format!("{key:?} is {value}, not a text")))
    }

    /// A list of texts, empty where not given.
    pub fn texts(&self, key: &str) -> Result<Vec<String>> {
        let Some(value) = self.given(key) else { return Ok(Vec::new()) };
        let texts = serde_json::from_value(value.clone());
        texts.map_err(|_| self.error(format!("{key:?} is {value}, not a list of texts")))
    }

    /// An object, where given.
    pub fn object(&self, key: &str) -> Result<Option<Config>> {
        let Some(value) = self.given(key) else {
            return Ok(None);
        };
        let keys = value.as_object().cloned();
        let keys = keys.ok_or_else(|| self.error(format!("{key:?} is {value}, not an object")))?;
        Ok(Some(Config { path: self.path.clone(), keys }))
    }

    /// The key's value; null counts as absent.
    fn given(&self, key: &str) -> Option<&Value> {
        self.keys.get(key).filter(|value| !value.is_null())
    }
}

fn positive_number(
    keys: &Map<String, Value>,
    key: &str,
) -> std::result::Result<Option<f64>, Value> {
    match keys.get(key) {
        None | Some(Value::Null) => Ok(None),
        Some(value) => match value.as_f64() {
            Some(number) if (number as f32).is_finite() && number as f32 > 0.0 => Ok(Some(number)),
            _ => Err(value.clone()),
        },
    }
}

fn read_json<T: for<'de> Deserialize<'de>>(path: &Path) -> Result<T> {
    let text = std::fs::read(path).map_err(|error| Error::io(path, error))?;
    serde_json::from_slice(&text)
        .map_err(|error| Error::ModelConfig { path: path.to_path_buf(), reason: error.to_string() })
}

/// How a model writes semantic IDs and reads histories: what the tokenizer's files say, and
/// `sidereal.json`.
#[derive(Debug, Clone, PartialEq)]
pub struct SidLayout {
    /// By level and code: the token, or [`NO_TOKEN`].
    pub levels: Vec<Vec<u32>>,
    /// How a history becomes the model's input.
    pub prompt: Prompt,
    /// Tokens that are forced before the codes where a request does not say.
    pub forced: Option<Forced>,
    /// Tokens that are forced after the codes and count in the score.
    pub suffix: Vec<u32>,
    /// The texts of the model's tokens.
    pub vocabulary: Vocabulary,
    /// What scores are normalised over where a request does not say.
    pub normalization: Normalization,
}

#[derive(Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct LayoutFile {
    levels: Option<Vec<LevelEntry>>,
    /// Whether levels may write one code with one token.
    #[serde(default)]
    shared_codes: bool,
    #[serde(default)]
    prompt: PromptEntry,
    forced: Option<ForcedEntry>,
    #[serde(default)]
    suffix: TokensEntry,
    #[serde(default)]
    normalize: Option<Normalization>,
}

/// Tokens before the codes, and whether they are part of the scores.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct ForcedEntry {
    tokens: TokensEntry,
    #[serde(default)]
    counted: bool,
}

impl SidLayout {
    /// Reads `sidereal.json` of a model folder. What it leaves out comes from the tokenizer's files:
    /// the levels, and the texts of tokens.
    ///
    /// # Errors
    /// [`Error::ModelConfig`] where something is missing or outside the vocabulary, or where the
    /// tokenizer contradicts it.
    pub fn read(folder: &Path, vocab_size: usize) -> Result<SidLayout> {
        SidLayout::read_for(folder, vocab_size, None)
    }

    /// Reads the layout for a catalog, which says how many levels there are where no file does.
    ///
    /// # Errors
    /// Those of [`SidLayout::read`]; [`Error::ModelFolder`] where there is no `sidereal.json` and
    /// the tokenizer's files do not stand in for it, with the smallest file that would do.
    pub fn read_for(
        folder: &Path,
        vocab_size: usize,
        catalog: Option<&Catalog>,
    ) -> Result<SidLayout> {
        let path = folder.join("sidereal.json");
        let file = match read_layout(&path) {
            Err(Error::Io { source, .. }) if source.kind() == ErrorKind::NotFound => None,
            other => Some(other?),
        };
        let error = |reason: String| Error::ModelConfig { path: path.clone(), reason };
        // A fault of a text in the file is named with the file.
        let in_file = |fault: Error| match fault {
            Error::InvalidOption { reason, .. } => error(reason),
            other => other,
        };
        let vocabulary = Vocabulary::of_folder(folder);
        let text = Text::of_folder(folder, vocabulary.clone());
        let file = match file {
            Some(file) => file,
            None => {
                LayoutFile { prompt: default_prompt(folder, vocab_size)?, ..Default::default() }
            }
        };
        let wanted = layout::Wanted { folder, vocabulary: &vocabulary, vocab_size, catalog };
        let levels = wanted.levels(file.levels.as_deref(), file.shared_codes).map_err(in_file)?;
        let prompt = Prompt::read(file.prompt, text.clone()).map_err(in_file)?;
        let suffix = file.suffix.resolve(&text).map_err(in_file)?;
        let forced = match file.forced {
            None => None,
            Some(ForcedEntry { tokens, counted }) => {
                let tokens = tokens.resolve(&text).map_err(in_file)?;
                Some(Forced { tokens, is_counted: counted })
            }
        };
        if forced.as_ref().is_some_and(|forced| forced.tokens.is_empty()) {
            return Err(error("\"forced\" has no tokens; leave it out".into()));
        }
        let around = prompt.fixed_tokens();
        let named = levels.iter().flatten().filter(|&&token| token != NO_TOKEN);
        let named = named.chain(&around).chain(&suffix);
        let named = named.chain(forced.iter().flat_map(|forced| &forced.tokens));
        if let Some(token) = named.max().filter(|&&token| token as usize >= vocab_size) {
            return Err(error(format!("token {token} is outside the vocabulary of {vocab_size}")));
        }
        let normalization = file.normalize.unwrap_or_default();
        Ok(SidLayout { levels, prompt, forced, suffix, vocabulary, normalization })
    }

    /// Single tokens that steps of most requests ask for.
    pub fn known_tokens(&self) -> Vec<u32> {
        let forced = self.forced.iter().flat_map(|forced| &forced.tokens);
        forced.chain(&self.suffix).copied().collect()
    }

    /// Checks that every code of the catalog has a token, and has it refuse others from now on.
    ///
    /// # Errors
    /// [`Error::LevelsMismatch`] where levels or codes do not go together.
    pub fn check(&self, catalog: &Catalog) -> Result<()> {
        let has_token = |tokens: &Vec<u32>| tokens.iter().map(|&token| token != NO_TOKEN).collect();
        catalog.require(self.levels.iter().map(has_token).collect())
    }
}

/// `sidereal.json`, with what it leaves to its project filled in.
fn read_layout(path: &Path) -> Result<LayoutFile> {
    let mut file: Value = read_json(path)?;
    let error = |reason: String| Error::ModelConfig { path: path.to_path_buf(), reason };
    if let Some(own) = file.as_object_mut()
        && let Some(project) = own.remove("project")
    {
        let name = project.as_str();
        let name = name.ok_or_else(|| error(format!("\"project\" is {project}, not a name")))?;
        for (field, value) in projects::layout(name).map_err(error)? {
            own.entry(field).or_insert(value);
        }
    }
    serde_json::from_value(file).map_err(|fault| error(fault.to_string()))
}

/// The prompt of a folder that does not describe one: the items, and the end token of an encoder.
fn default_prompt(folder: &Path, vocab_size: usize) -> Result<PromptEntry> {
    let config = Config::read(&folder.join("config.json"))?;
    match config.flag("is_encoder_decoder")? {
        Some(true) => {
            Ok(PromptEntry::with_suffix(config.token_or("eos_token_id", vocab_size, 1)?))
        }
        _ => Ok(PromptEntry::default()),
    }
}
