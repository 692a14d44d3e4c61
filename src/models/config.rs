//! `config.json` and `sidereal.json`: what a model folder says of itself.

use std::collections::HashMap;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use serde::Deserialize;
use serde_json::{Map, Value};

use super::levels::{self, CodeTemplate, Derived, Group, MAX_CODES};
use super::vocabulary::Vocabulary;
use crate::backend::NO_TOKEN;
use crate::catalog::sid::MAX_LEVELS;
use crate::catalog::{Catalog, items};
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

/// One level: either the first token, or a template.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct LevelEntry {
    size: Option<usize>,
    first_token: Option<u32>,
    template: Option<String>,
    /// The number that a template has for code 0.
    #[serde(default)]
    first_number: u64,
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
        let is_derived = file.as_ref().is_none_or(|file| file.levels.is_none());
        let file = match file {
            Some(file) => file,
            None => {
                LayoutFile { prompt: default_prompt(folder, vocab_size)?, ..Default::default() }
            }
        };
        let levels = match &file.levels {
            Some(entries) => levels_of_file(entries, &vocabulary, vocab_size).map_err(in_file)?,
            None => derived_levels(folder, &path, &vocabulary, catalog)?,
        };
        if !is_derived && let Some(reason) = known(levels::contradiction(&levels, &vocabulary))? {
            return Err(error(reason));
        }
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
        check_tokens_of_codes(&levels, file.shared_codes).map_err(error)?;
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

/// Levels as the file names them.
fn levels_of_file(
    entries: &[LevelEntry],
    vocabulary: &Vocabulary,
    vocab_size: usize,
) -> Result<Vec<Vec<u32>>> {
    let error = |reason: String| Error::InvalidOption { option: "levels", reason };
    if entries.is_empty() || entries.len() > MAX_LEVELS {
        let found = entries.len();
        return Err(error(format!(
            "\"levels\" has {found} entries, 1 to {MAX_LEVELS} are possible"
        )));
    }
    let is_clear = |level: &LevelEntry| level.first_token.is_some() != level.template.is_some();
    if let Some(number) = entries.iter().position(|level| !is_clear(level)) {
        return Err(error(format!(
            "level {number} must have either \"first_token\" or \"template\""
        )));
    }
    let mut levels = Vec::new();
    for (number, level) in entries.iter().enumerate() {
        if let Some(size) = level.size.filter(|size| !(1..=MAX_CODES).contains(size)) {
            return Err(error(format!(
                "level {number} has size {size}, 1 to {MAX_CODES} are possible"
            )));
        }
        let tokens: Vec<u32> = match (&level.template, level.first_token, level.size) {
            (Some(template), ..) => {
                let template = CodeTemplate::parse(template).map_err(error)?;
                let token = |code: usize| {
                    vocabulary.token(&template.text(level.first_number + code as u64))
                };
                let known = |code| Ok(token(code)?.unwrap_or(NO_TOKEN));
                let mut tokens = (0..level.size.unwrap_or(MAX_CODES))
                    .map(known)
                    .collect::<Result<Vec<u32>>>()?;
                if level.size.is_none() {
                    let last = tokens.iter().rposition(|&token| token != NO_TOKEN);
                    tokens.truncate(last.map_or(0, |last| last + 1));
                }
                tokens
            }
            (None, Some(first), Some(size)) => {
                let end = first as usize + size;
                if end > vocab_size {
                    return Err(error(format!(
                        "level {number} ends at token {end}, outside the vocabulary of {vocab_size}"
                    )));
                }
                (first..end as u32).collect()
            }
            (None, ..) => {
                return Err(error(format!("level {number} needs \"size\" beside \"first_token\"")));
            }
        };
        if tokens.iter().all(|&token| token == NO_TOKEN) {
            return Err(error(format!("level {number}: no code has a token in tokenizer.json")));
        }
        levels.push(tokens);
    }
    Ok(levels)
}

/// What a vocabulary says, where it has files.
fn known<T: Default>(found: Result<T>) -> Result<T> {
    match found {
        Err(Error::Io { source, .. }) if source.kind() == ErrorKind::NotFound => Ok(T::default()),
        other => other,
    }
}

/// What the tokenizer's files of a folder say about its levels.
///
/// # Errors
/// Those of the files.
pub fn derive_levels(
    folder: &Path,
    vocabulary: &Vocabulary,
    catalog: Option<&Catalog>,
) -> Result<Derived> {
    let added = known(vocabulary.added().map(<[_]>::to_vec))?;
    let first_item = items::first_codes_beside(folder)?;
    Ok(levels::derive(&added, first_item.as_deref(), catalog))
}

fn derived_levels(
    folder: &Path,
    path: &Path,
    vocabulary: &Vocabulary,
    catalog: Option<&Catalog>,
) -> Result<Vec<Vec<u32>>> {
    let derived = derive_levels(folder, vocabulary, catalog)?;
    if !derived.levels.is_empty() {
        return Ok(derived.levels.iter().map(Group::by_code).collect());
    }
    let files = known(vocabulary.files().map(<[_]>::to_vec))?;
    let where_from = match files.is_empty() {
        true => "no file of a tokenizer (tokenizer.json, added_tokens.json, \
                 tokenizer_config.json) is there that would say it instead"
            .to_string(),
        false => format!("{} does not say it: {}", files.join(", "), derived.reason),
    };
    let smallest = smallest_file(&derived, catalog);
    Err(Error::ModelFolder {
        path: folder.to_path_buf(),
        reason: format!(
            "nothing says which tokens stand for the codes of semantic IDs: {name} has no \
             \"levels\", and {where_from}. Put the tokenizer's files beside the weights, or write \
             {name}; the smallest is {smallest} (docs/models.md)",
            name = path.file_name().unwrap_or_default().to_string_lossy(),
        ),
    })
}

/// The smallest `sidereal.json` for a catalog.
fn smallest_file(derived: &Derived, catalog: Option<&Catalog>) -> String {
    let sizes: Vec<usize> = match catalog.map(Catalog::snapshot) {
        Some(snapshot) => (0..snapshot.num_levels())
            .map(|level| snapshot.codes_at(level).max().map_or(1, |last| usize::from(last) + 1))
            .collect(),
        None => vec![256; 3],
    };
    let named = derived.others.len() >= sizes.len();
    let level = |(number, size): (usize, &usize)| match named {
        true => format!("{{\"template\": \"{}\"}}", derived.others[number].0.template),
        false => format!("{{\"size\": {size}, \"first_token\": TOKEN}}"),
    };
    let levels: Vec<String> = sizes.iter().enumerate().map(level).collect();
    let what = if named { "" } else { ", with the token of each level's code 0 for TOKEN" };
    format!("{{\"levels\": [{}]}}{what}", levels.join(", "))
}
