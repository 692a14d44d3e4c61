//! `config.json` and `sidereal.json`: what a model folder says of itself.

use std::collections::BTreeSet;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use serde::Deserialize;
use serde::de::IgnoredAny;
use serde_json::{Map, Value};

use super::layout::{self, LevelEntry};
use super::vocabulary::Vocabulary;
use crate::backend::NO_TOKEN;
use crate::catalog::Catalog;
use crate::checkpoint::keys::{is_listed, says_nothing};
use crate::error::{Error, Result};
use crate::json;
pub use crate::prompt::Prompt;
use crate::prompt::{PhraseLayout, PhrasesEntry, PromptEntry, Text, TokensEntry, projects};
use crate::request::Forced;
use crate::search::Normalization;

/// The largest size of any dimension that a configuration may give; guards the arithmetic.
const MAX_DIMENSION: u64 = 1 << 24;

/// A `config.json` in the layout of Hugging Face, asked key by key.
///
/// A key that nobody asked for is an error once the network is there ([`finish`](Config::finish)),
/// unless it says nothing, is known to be without effect, or is listed as ignored.
#[derive(Clone)]
pub struct Config {
    path: PathBuf,
    keys: Map<String, Value>,
    /// The keys of `generation_config.json`.
    generation: Map<String, Value>,
    /// Names of keys and tensors that the folder's owner wants passed over.
    ignored: Vec<String>,
    asked: Arc<Mutex<BTreeSet<String>>>,
}

/// Keys that change no answer, whatever network they are of: sizes of dropout and initial weights,
/// how a program ran, tokens of a tokenizer, labels of classifiers, and defaults of `generate`, which
/// a request says here.
const WITHOUT_EFFECT: &str = "
    _attn_implementation _attn_implementation_autoset _attn_implementation_internal _commit_hash _flash_attn_2_enabled
    _from_model_config _name_or_path architectures attention_dropout attn_implementation
    attn_pdrop bos_token bos_token_id classifier_dropout cls_token_id
    decoder_start_token_id diversity_penalty do_sample dropout dropout_rate dtype early_stopping
    embd_pdrop eos_token eos_token_id finetuning_task hidden_dropout hidden_dropout_prob id2label
    image_token_id initializer_factor initializer_range is_decoder is_encoder_decoder keys_to_ignore_at_inference
    label2id length_penalty mask_token_id max_length max_new_tokens max_sequence_length min_length
    model_max_length model_type num_beam_groups num_beams num_labels num_return_sequences
    output_attentions output_hidden_states output_past output_scores pad_token pad_token_id prefix
    pretraining_tp problem_type remove_invalid_values resid_pdrop return_dict return_dict_in_generate sep_token_id
    task_specific_params temperature tokenizer_class tokenizer_name top_k top_p torch_dtype
    torchscript transformers_version typical_p unk_token unk_token_id unsloth_fixed unsloth_version use_cache
    use_flash_attention use_flash_attention_2 use_mem_eff_attention _unsloth_fixed
    gradient_checkpointing
";
/// Flags that are true where they are left out.
const TRUE_BY_DEFAULT: [&str; 6] =
    ["causal", "is_causal", "scale_attn_weights", "use_rms_norm", "use_rope", "rope"];
/// Keys of `generate` that change the probabilities themselves, with the values that change nothing
/// beside null and zero. Older exports have them in `config.json`.
const CHANGES_LOGITS: [(&str, f64); 12] = [
    ("bad_words_ids", 0.0),
    ("begin_suppress_tokens", 0.0),
    ("encoder_no_repeat_ngram_size", 0.0),
    ("encoder_repetition_penalty", 1.0),
    ("exponential_decay_length_penalty", 0.0),
    ("forced_bos_token_id", 0.0),
    ("forced_decoder_ids", 0.0),
    ("guidance_scale", 1.0),
    ("no_repeat_ngram_size", 0.0),
    ("repetition_penalty", 1.0),
    ("sequence_bias", 0.0),
    ("suppress_tokens", 0.0),
];

impl Config {
    /// Reads a file, with `generation_config.json` and the list `"ignore"` of `sidereal.json` beside
    /// it, where they are there.
    ///
    /// # Errors
    /// The operating system's, or [`Error::ModelConfig`] where it is no JSON object.
    pub fn read(path: &Path) -> Result<Config> {
        let mut config = Config::new(path, read_json(path)?);
        let generation = path.with_file_name("generation_config.json");
        if generation.exists() {
            config.generation = read_json(&generation)?;
        }
        config.ignore(ignored_by(path.parent().unwrap_or(Path::new("")))?);
        Ok(config)
    }

    /// A configuration in memory; `path` stands in its errors.
    pub fn new(path: &Path, keys: Map<String, Value>) -> Config {
        let path = path.to_path_buf();
        let (generation, ignored, asked) = Default::default();
        Config { path, keys, generation, ignored, asked }
    }

    /// Passes over keys and tensors of these names from now on; a name may end in `*` for any rest.
    pub fn ignore(&mut self, names: Vec<String>) {
        self.ignored.extend(names);
    }

    /// Whether the folder's owner wants a key or tensor passed over.
    pub fn is_ignored(&self, name: &str) -> bool {
        is_listed(&self.ignored, name)
    }

    /// Sets a key, as where an adapter brings more tokens than its base has.
    pub(crate) fn set(&mut self, key: &str, value: Value) {
        self.keys.insert(key.into(), value);
    }

    /// The settings of `generate` that change its probabilities, and none here.
    pub fn notes(&self) -> Vec<String> {
        let mut notes = Vec::new();
        for keys in [&self.generation, &self.keys] {
            for (key, neutral) in CHANGES_LOGITS {
                let value = keys.get(key).unwrap_or(&Value::Null);
                if !says_nothing(value) && value.as_f64() != Some(neutral) {
                    notes.push(format!("{key} {value} is for generate and changes no score here"));
                }
            }
        }
        notes
    }

    /// Checks that no key is left over that could change an answer.
    ///
    /// # Errors
    /// [`Error::ModelConfig`] with the first such key.
    pub fn finish(&self) -> Result<()> {
        let asked = self.asked.lock().unwrap_or_else(PoisonError::into_inner);
        let is_harmless = |key: &str| {
            let mut of_generate = CHANGES_LOGITS.iter().map(|(known, _)| *known);
            let mut known = WITHOUT_EFFECT.split_whitespace();
            known.any(|known| known == key)
                || of_generate.any(|known| known == key)
                || asked.contains(key)
        };
        for (key, value) in &self.keys {
            let says_nothing = match TRUE_BY_DEFAULT.contains(&key.as_str()) {
                true => value == &Value::Bool(true) || value.is_null(),
                false => says_nothing(value),
            };
            if !says_nothing && !is_harmless(key) && !self.is_ignored(key) {
                return Err(self.error(format!(
                    "{key:?} is {value}, and this version does not know what it changes; where it \
                     changes no answer, list it in sidereal.json: \"ignore\": [{key:?}]"
                )));
            }
        }
        Ok(())
    }

    /// The file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// An error about this file.
    pub fn error(&self, reason: String) -> Error {
        Error::ModelConfig { path: self.path.clone(), reason }
    }

    /// The class of the network, as `T5ForConditionalGeneration`, where given.
    pub fn architecture(&self) -> Option<&str> {
        self.given("architectures")?.get(0)?.as_str()
    }

    /// The token that a decoder starts with: `generate` takes that of `generation_config.json` first.
    pub fn start_token(&self, vocab_size: usize) -> Result<u32> {
        // Where nobody says it, T5's convention: the padding.
        let padding = self.given("pad_token_id").and_then(Value::as_u64).unwrap_or(0);
        let default = if padding < vocab_size as u64 { padding as u32 } else { 0 };
        let default = self.token_or("decoder_start_token_id", vocab_size, default)?;
        let generation = Config {
            path: self.path.with_file_name("generation_config.json"),
            keys: self.generation.clone(),
            ..self.clone()
        };
        generation.token_or("decoder_start_token_id", vocab_size, default)
    }

    /// The tokens that end a text: `generate` takes those of `generation_config.json` first.
    pub(super) fn end_tokens(&self) -> Vec<u32> {
        let given = |keys: &Map<String, Value>| keys.get("eos_token_id").cloned();
        let tokens = given(&self.generation).or_else(|| given(&self.keys)).unwrap_or_default();
        let one = |token: &Value| token.as_u64().and_then(|token| u32::try_from(token).ok());
        match &tokens {
            Value::Array(tokens) => tokens.iter().filter_map(one).collect(),
            token => one(token).into_iter().collect(),
        }
    }

    /// A positive whole number.
    pub fn size(&self, key: &str) -> Result<usize> {
        self.size_if_given(key)?.ok_or_else(|| self.error(format!("{key:?} is missing")))
    }

    /// A positive whole number with a default.
    pub fn size_or(&self, key: &str, default: usize) -> Result<usize> {
        Ok(self.size_if_given(key)?.unwrap_or(default))
    }

    /// A whole number, perhaps zero, with a default.
    pub(super) fn size_or_zero(&self, key: &str, default: usize) -> Result<usize> {
        match self.given(key).is_some_and(|value| value.as_u64() == Some(0)) {
            true => Ok(0),
            false => self.size_or(key, default),
        }
    }

    /// A positive whole number, where given.
    pub fn size_if_given(&self, key: &str) -> Result<Option<usize>> {
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
        self.given(key);
        positive_number(&self.keys, key).map(|found| found.unwrap_or(default)).map_err(|value| {
            self.error(format!("{key:?} is {value}, not a number above zero that f32 can hold"))
        })
    }

    /// A number above or equal to zero, zero where not given.
    pub(super) fn number_or_zero(&self, key: &str) -> Result<f64> {
        let is_zero = self.given(key).is_some_and(|value| value.as_f64() == Some(0.0));
        if is_zero { Ok(0.0) } else { self.number_or(key, 0.0) }
    }

    /// Whether there are no keys.
    pub(super) fn is_empty(&self) -> bool {
        self.keys.is_empty()
    }

    /// A yes or no, where given.
    pub fn flag(&self, key: &str) -> Result<Option<bool>> {
        let Some(value) = self.given(key) else {
            return Ok(None);
        };
        let flag = value.as_bool();
        flag.map(Some).ok_or_else(|| self.error(format!("{key:?} is {value}, not true or false")))
    }

    /// Checks that a yes or no, where given, is this one.
    pub(super) fn expect_flag(&self, key: &str, expected: bool) -> Result<()> {
        match self.flag(key)?.unwrap_or(expected) == expected {
            true => Ok(()),
            false => Err(self.error(format!("{key:?} must be {expected} for this network"))),
        }
    }

    /// Says that keys change no answer of this network.
    pub(super) fn without_effect(&self, keys: &[&str]) {
        for key in keys {
            self.given(key);
        }
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
        Ok(Some(Config { ignored: self.ignored.clone(), ..Config::new(&self.path, keys) }))
    }

    /// Whether a key is there, be it null.
    pub(super) fn has(&self, key: &str) -> bool {
        self.keys.contains_key(key)
    }

    /// The value of a key, for its owner to see: a network that needs it asks otherwise.
    pub fn peek(&self, key: &str) -> Option<&Value> {
        self.keys.get(key)
    }

    /// The text of a key, where it is one.
    pub fn text(&self, key: &str) -> Option<&str> {
        self.given(key)?.as_str()
    }

    /// The key's value; null counts as absent.
    pub(super) fn given(&self, key: &str) -> Option<&Value> {
        self.asked.lock().unwrap_or_else(PoisonError::into_inner).insert(key.into());
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

/// The names that a folder's `sidereal.json` lists under `"ignore"`.
///
/// # Errors
/// The operating system's; [`Error::ModelConfig`] where the list is none of texts.
pub(super) fn ignored_by(folder: &Path) -> Result<Vec<String>> {
    #[derive(Deserialize)]
    struct Ignored {
        #[serde(default)]
        ignore: Vec<String>,
    }
    let path = folder.join("sidereal.json");
    match path.exists() {
        true => Ok(read_json::<Ignored>(&path)?.ignore),
        false => Ok(Vec::new()),
    }
}

fn read_json<T: for<'de> Deserialize<'de>>(path: &Path) -> Result<T> {
    let text = std::fs::read(path).map_err(|error| Error::io(path, error))?;
    json::parse_bytes::<T>(&text)
        .map_err(|reason| Error::ModelConfig { path: path.to_path_buf(), reason })
}

/// How a model writes items and reads histories: what the tokenizer's files say, and
/// `sidereal.json`.
#[derive(Debug, Clone, PartialEq)]
pub struct SidLayout {
    /// By level and code: the token, or [`NO_TOKEN`]. May be empty where there are phrases.
    pub levels: Vec<Vec<u32>>,
    /// What is written in the place of semantic IDs; levels say then how a prompt writes items alone.
    pub phrases: Option<PhraseLayout>,
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
    phrases: Option<PhrasesEntry>,
    #[serde(default)]
    prompt: PromptEntry,
    forced: Option<ForcedEntry>,
    #[serde(default)]
    suffix: TokensEntry,
    #[serde(default)]
    normalize: Option<Normalization>,
    /// Names of keys and tensors to pass over, which [`Config::read`] takes.
    #[serde(default, rename = "ignore")]
    _ignore: IgnoredAny,
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
        let levels = match (&file.phrases, &file.levels) {
            (Some(_), None) => Vec::new(),
            (_, levels) => wanted.levels(levels.as_deref()).map_err(in_file)?,
        };
        let phrases = match file.phrases {
            None => None,
            Some(entry) => {
                let ends = end_tokens(folder)?;
                Some(PhraseLayout::read(entry, text.clone(), &ends).map_err(in_file)?)
            }
        };
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
        if phrases.is_some() && !suffix.is_empty() {
            return Err(error(
                "\"suffix\" follows codes; a phrase has an \"end\" of its own".into(),
            ));
        }
        let around = prompt.fixed_tokens();
        let named = levels.iter().flatten().filter(|&&token| token != NO_TOKEN);
        let named = named.chain(&around).chain(&suffix);
        let named = named.chain(forced.iter().flat_map(|forced| &forced.tokens));
        let named = named.chain(phrases.iter().map(|phrases| &phrases.end));
        if let Some(token) = named.max().filter(|&&token| token as usize >= vocab_size) {
            return Err(error(format!("token {token} is outside the vocabulary of {vocab_size}")));
        }
        layout::check_tokens_of_codes(&levels, file.shared_codes).map_err(error)?;
        let normalization = file.normalize.unwrap_or_default();
        Ok(SidLayout { levels, phrases, prompt, forced, suffix, vocabulary, normalization })
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
        if self.levels.is_empty() {
            return Ok(());
        }
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
    json::from_value(file).map_err(error)
}

/// The tokens that end a text, as the configuration of a folder says.
fn end_tokens(folder: &Path) -> Result<Vec<u32>> {
    let path = folder.join("config.json");
    if !path.exists() {
        return Ok(Vec::new()); // an adapter's folder
    }
    Ok(Config::read(&path)?.end_tokens())
}

/// The prompt of a folder that does not describe one: the items, and the end token of an encoder.
fn default_prompt(folder: &Path, vocab_size: usize) -> Result<PromptEntry> {
    let path = folder.join("config.json");
    if !path.exists() {
        return Ok(PromptEntry::default()); // an adapter's folder
    }
    let config = Config::read(&path)?;
    match config.flag("is_encoder_decoder")? {
        Some(true) => {
            Ok(PromptEntry::with_suffix(config.token_or("eos_token_id", vocab_size, 1)?))
        }
        _ => Ok(PromptEntry::default()),
    }
}
