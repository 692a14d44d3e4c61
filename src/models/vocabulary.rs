//! Which token has which text: what the tokenizer's files of a model folder say.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};

use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::Value;

use crate::backend::NO_TOKEN;
use crate::error::{Error, Result};
use crate::json;

/// Stands for all larger ones: no vocabulary goes so far.
const LARGEST_TOKEN: u64 = NO_TOKEN as u64 - 1;

/// The tokens of a model folder by their texts, added ones included.
///
/// Texts come from `tokenizer.json`, or from `vocab.json` where that is missing, and those of added
/// tokens from `added_tokens.json` and the `added_tokens_decoder` of `tokenizer_config.json` as
/// well: slow tokenizers are saved without a `tokenizer.json`. A text to which two files give
/// different tokens is an error when it is looked up.
///
/// The files are read when a text is first looked up. Clones share what was read. The default has no
/// folder and knows no text.
#[derive(Debug, Clone, Default)]
pub struct Vocabulary(Option<Arc<Folder>>);

#[derive(Debug)]
struct Folder {
    path: PathBuf,
    texts: OnceLock<Result<Texts>>,
    by_token: OnceLock<HashMap<u32, String>>,
}

#[derive(Debug, Default)]
struct Texts {
    tokens: HashMap<String, u32>,
    /// Added tokens, in the order of their numbers.
    added: Vec<(u32, String)>,
    /// Texts of which two files say different tokens, with the reason.
    contradictions: HashMap<String, String>,
    /// The files that were read.
    files: Vec<&'static str>,
}

impl Vocabulary {
    /// The vocabulary of a model folder.
    pub fn of_folder(folder: &Path) -> Vocabulary {
        let path = folder.to_path_buf();
        let (texts, by_token) = Default::default();
        Vocabulary(Some(Arc::new(Folder { path, texts, by_token })))
    }

    /// The token of exactly this text, as the tokenizer's files write it, where there is one.
    ///
    /// # Errors
    /// The operating system's where no such file is there; [`Error::ModelConfig`] where a file is
    /// not of the known form, or two files contradict each other about the text.
    pub fn token(&self, text: &str) -> Result<Option<u32>> {
        let Some(folder) = &self.0 else { return Ok(None) };
        let texts = folder.texts()?;
        match texts.contradictions.get(text) {
            Some(reason) => {
                Err(Error::ModelConfig { path: folder.path.clone(), reason: reason.clone() })
            }
            None => Ok(texts.tokens.get(text).copied()),
        }
    }

    /// The text of a token; an added token's before another's of the same number.
    ///
    /// # Errors
    /// Those of reading the files.
    pub fn text(&self, token: u32) -> Result<Option<&str>> {
        let Some(folder) = &self.0 else { return Ok(None) };
        let texts = folder.texts()?;
        let by_token = folder.by_token.get_or_init(|| {
            let all = texts.tokens.iter().map(|(text, &token)| (token, text.clone()));
            all.chain(texts.added.iter().cloned()).collect()
        });
        Ok(by_token.get(&token).map(String::as_str))
    }

    /// Added tokens with their texts, in the order of their numbers; all tokens of a tokenizer whose
    /// model is a plain list of words.
    ///
    /// # Errors
    /// Those of reading the files.
    pub fn added(&self) -> Result<&[(u32, String)]> {
        match &self.0 {
            Some(folder) => Ok(&folder.texts()?.added),
            None => Ok(&[]),
        }
    }

    /// The names of the files that were found and read.
    ///
    /// # Errors
    /// Those of reading the files.
    pub fn files(&self) -> Result<&[&'static str]> {
        match &self.0 {
            Some(folder) => Ok(&folder.texts()?.files),
            None => Ok(&[]),
        }
    }
}

/// Vocabularies of one folder.
impl PartialEq for Vocabulary {
    fn eq(&self, other: &Vocabulary) -> bool {
        let path =
            |vocabulary: &Vocabulary| vocabulary.0.as_ref().map(|folder| &folder.path).cloned();
        path(self) == path(other)
    }
}

impl Folder {
    fn texts(&self) -> Result<&Texts> {
        self.texts.get_or_init(|| read(&self.path)).as_ref().map_err(Clone::clone)
    }
}

#[derive(Deserialize)]
struct TokenizerFile {
    #[serde(default)]
    added_tokens: Vec<AddedToken>,
    model: Option<TokenizerModel>,
}

#[derive(Deserialize)]
struct AddedToken {
    id: u32,
    content: String,
}

#[derive(Deserialize)]
struct TokenizerModel {
    #[serde(rename = "type", default)]
    kind: Option<String>,
    #[serde(default)]
    vocab: Value,
}

#[derive(Deserialize)]
struct TokenizerConfig {
    #[serde(default)]
    added_tokens_decoder: HashMap<String, Value>,
}

fn read(folder: &Path) -> Result<Texts> {
    let mut texts = Texts::default();
    match file::<TokenizerFile>(folder, "tokenizer.json")? {
        Some(contents) => {
            texts.files.push("tokenizer.json");
            if let Some(model) = contents.model {
                let is_word_list = model.kind.as_deref() == Some("WordLevel");
                texts.insert_model(model.vocab);
                if is_word_list {
                    texts.added.extend(texts.tokens.iter().map(|(text, &id)| (id, text.clone())));
                }
            }
            // Within this file an added token stands before a word of the model.
            for AddedToken { id, content } in contents.added_tokens {
                texts.added.push((id, content.clone()));
                texts.tokens.insert(content, id);
            }
        }
        None => {
            if let Some(vocab) = file::<Value>(folder, "vocab.json")? {
                texts.files.push("vocab.json");
                texts.insert_model(vocab);
            }
        }
    }
    if let Some(added) = file::<HashMap<String, u32>>(folder, "added_tokens.json")? {
        texts.files.push("added_tokens.json");
        for (text, id) in added {
            texts.insert_added("added_tokens.json", text, id);
        }
    }
    if let Some(config) = file::<TokenizerConfig>(folder, "tokenizer_config.json")? {
        let tokens = config.added_tokens_decoder;
        if !tokens.is_empty() {
            texts.files.push("tokenizer_config.json");
        }
        for (id, token) in tokens {
            // A token is an object with its content, or the content alone.
            let content = token.get("content").unwrap_or(&token).as_str();
            if let (Ok(id), Some(content)) = (id.parse(), content) {
                texts.insert_added("tokenizer_config.json", content.to_string(), id);
            }
        }
    }
    if texts.files.is_empty() {
        let missing = std::io::Error::from(std::io::ErrorKind::NotFound);
        return Err(Error::io(&folder.join("tokenizer.json"), missing));
    }
    texts.added.sort_unstable();
    texts.added.dedup();
    Ok(texts)
}

impl Texts {
    fn insert_model(&mut self, vocab: Value) {
        match vocab {
            // Byte-pair and word-level models map texts to numbers, unigram models list pairs.
            Value::Object(entries) => {
                let number = |(text, id): (String, Value)| {
                    Some((text, id.as_u64()?.min(LARGEST_TOKEN) as u32))
                };
                self.tokens.extend(entries.into_iter().filter_map(number));
            }
            Value::Array(entries) => {
                let texts = entries.into_iter().enumerate();
                let number =
                    |(id, entry): (usize, Value)| Some((entry[0].as_str()?.to_string(), id as u32));
                self.tokens.extend(texts.filter_map(number));
            }
            _ => {}
        }
    }

    fn insert_added(&mut self, file: &'static str, text: String, id: u32) {
        self.added.push((id, text.clone()));
        match self.tokens.insert(text.clone(), id) {
            Some(other) if other != id => {
                let reason = format!(
                    "{file} says that {text:?} is token {id}, another of its tokenizer's files \
                     (tokenizer.json, added_tokens.json, tokenizer_config.json) says {other}; \
                     remove the file that belongs to another checkpoint"
                );
                self.contradictions.insert(text, reason);
            }
            _ => {}
        }
    }
}

/// A file of JSON in the folder, where it is there.
fn file<T: DeserializeOwned>(folder: &Path, name: &str) -> Result<Option<T>> {
    let path = folder.join(name);
    match std::fs::read(&path) {
        Ok(text) => match json::parse_bytes::<T>(&text) {
            Ok(contents) => Ok(Some(contents)),
            Err(reason) => Err(Error::ModelConfig { path, reason }),
        },
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(Error::io(&path, error)),
    }
}
