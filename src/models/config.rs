//! `config.json` and `sidereal.json`: what a model folder says of itself.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use serde::Deserialize;
use serde_json::{Map, Value};

use super::vocabulary::Vocabulary;
use crate::backend::NO_TOKEN;
use crate::catalog::Catalog;
use crate::catalog::sid::MAX_LEVELS;
use crate::error::{Error, Result};
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

/// How a model writes semantic IDs and reads histories, from `sidereal.json`.
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

/// How a history becomes the model's input: `prefix`, the items' codes with `separator` between
/// items, `suffix`.
#[derive(Debug, Clone, PartialEq, Eq, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Prompt {
    /// Tokens before the first item.
    pub prefix: Vec<u32>,
    /// Tokens after the last item.
    pub suffix: Vec<u32>,
    /// Tokens between two items.
    pub separator: Vec<u32>,
    /// The newest items that are kept; all where absent.
    pub max_items: Option<usize>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct LayoutFile {
    levels: Vec<LevelEntry>,
    /// Whether levels may write one code with one token.
    #[serde(default)]
    shared_codes: bool,
    #[serde(default)]
    prompt: Prompt,
    forced: Option<ForcedEntry>,
    #[serde(default)]
    suffix: Vec<u32>,
    #[serde(default)]
    normalize: Option<Normalization>,
}

/// Tokens before the codes, and whether they are part of the scores.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct ForcedEntry {
    tokens: Vec<u32>,
    #[serde(default)]
    counted: bool,
}

/// One level: its size and either the first token or a template.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct LevelEntry {
    size: usize,
    first_token: Option<u32>,
    template: Option<String>,
}

impl SidLayout {
    /// Reads `sidereal.json` of a model folder; token templates are looked up in the folder's
    /// `tokenizer.json`.
    ///
    /// # Errors
    /// [`Error::ModelConfig`] where something is missing or outside the vocabulary.
    pub fn read(folder: &Path, vocab_size: usize) -> Result<SidLayout> {
        let path = folder.join("sidereal.json");
        let file: LayoutFile = read_json(&path)?;
        let error = |reason: String| Error::ModelConfig { path: path.clone(), reason };
        if file.levels.is_empty() || file.levels.len() > MAX_LEVELS {
            let found = file.levels.len();
            return Err(error(format!(
                "\"levels\" has {found} entries, 1 to {MAX_LEVELS} are possible"
            )));
        }
        let is_clear = |level: &LevelEntry| level.first_token.is_some() != level.template.is_some();
        if let Some(number) = file.levels.iter().position(|level| !is_clear(level)) {
            return Err(error(format!(
                "level {number} must have either \"first_token\" or \"template\""
            )));
        }
        let vocabulary = Vocabulary::of_folder(folder);
        let mut levels = Vec::new();
        for (number, level) in file.levels.iter().enumerate() {
            let size = level.size;
            if size == 0 || size > usize::from(u16::MAX) + 1 {
                return Err(error(format!(
                    "level {number} has size {size}, 1 to 65536 are possible"
                )));
            }
            let tokens: Vec<u32> = if let Some(template) = &level.template {
                if !template.contains("{}") {
                    return Err(error(format!("template {template:?} has no {{}} for the code")));
                }
                let token = |code: usize| template.replace("{}", &code.to_string());
                let known = |code| Ok(vocabulary.token(&token(code))?.unwrap_or(NO_TOKEN));
                (0..size).map(known).collect::<Result<_>>()?
            } else {
                let first = level.first_token.unwrap_or_default();
                let end = first as usize + size;
                if end > vocab_size {
                    return Err(error(format!(
                        "level {number} ends at token {end}, outside the vocabulary of {vocab_size}"
                    )));
                }
                (first..end as u32).collect()
            };
            if tokens.iter().all(|&token| token == NO_TOKEN) {
                return Err(error(format!(
                    "level {number}: no code has a token in tokenizer.json"
                )));
            }
            levels.push(tokens);
        }
        check_tokens_of_codes(&levels, file.shared_codes).map_err(error)?;
        let Prompt { prefix, suffix, separator, max_items } = &file.prompt;
        if *max_items == Some(0) {
            return Err(error("\"max_items\" must be at least 1".into()));
        }
        let named = levels.iter().flatten().filter(|&&token| token != NO_TOKEN);
        let named = named.chain(prefix).chain(suffix).chain(separator).chain(&file.suffix);
        let forced = file
            .forced
            .map(|ForcedEntry { tokens, counted }| Forced { tokens, is_counted: counted });
        if forced.as_ref().is_some_and(|forced| forced.tokens.is_empty()) {
            return Err(error("\"forced\" has no tokens; leave it out".into()));
        }
        let named = named.chain(forced.iter().flat_map(|forced| &forced.tokens));
        if let Some(token) = named.max().filter(|&&token| token as usize >= vocab_size) {
            return Err(error(format!("token {token} is outside the vocabulary of {vocab_size}")));
        }
        Ok(SidLayout {
            levels,
            prompt: file.prompt,
            forced,
            suffix: file.suffix,
            vocabulary,
            normalization: file.normalize.unwrap_or_default(),
        })
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

/// Checks that tokens tell codes apart: within a level always, and between levels unless one token
/// is one code wherever it stands, which `is_shared` must say.
fn check_tokens_of_codes(levels: &[Vec<u32>], is_shared: bool) -> std::result::Result<(), String> {
    // By token: the first level and code that are written with it.
    let mut codes: HashMap<u32, (usize, usize)> = HashMap::new();
    for (level, tokens) in levels.iter().enumerate() {
        for (code, &token) in tokens.iter().enumerate().filter(|&(_, &token)| token != NO_TOKEN) {
            let (other_level, other_code) = *codes.entry(token).or_insert((level, code));
            if (other_level, other_code) == (level, code) {
                continue; // the first with this token
            }
            if other_level == level {
                return Err(format!(
                    "codes {other_code} and {code} of level {level} are both token {token}, and \
                     items that differ in them could not be told apart; give each code a token of \
                     its own"
                ));
            }
            if !is_shared {
                return Err(format!(
                    "token {token} is code {other_code} of level {other_level} and code {code} of \
                     level {level}; correct \"first_token\" or \"size\", or say \
                     \"shared_codes\": true if the model was trained with one range of tokens for \
                     several levels"
                ));
            }
            if other_code != code {
                return Err(format!(
                    "token {token} is code {other_code} of level {other_level} and code {code} of \
                     level {level}; levels with \"shared_codes\" write one code with one token"
                ));
            }
        }
    }
    Ok(())
}
