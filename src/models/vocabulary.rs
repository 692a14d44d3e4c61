//! Which token has a text: the vocabulary of a model folder's `tokenizer.json`.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};

use serde::Deserialize;
use serde_json::Value;

use crate::backend::NO_TOKEN;
use crate::error::{Error, Result};

/// Stands for all larger ones: no vocabulary goes so far.
const LARGEST_TOKEN: u64 = NO_TOKEN as u64 - 1;

/// The tokens of a `tokenizer.json` by their texts, added ones included.
///
/// The file is read when a text is first looked up. Clones share what was read. The default has no
/// file and knows no text.
#[derive(Debug, Clone, Default)]
pub struct Vocabulary(Option<Arc<File>>);

#[derive(Debug)]
struct File {
    path: PathBuf,
    tokens: OnceLock<Result<HashMap<String, u32>>>,
}

impl Vocabulary {
    /// The vocabulary of a model folder.
    pub fn of_folder(folder: &Path) -> Vocabulary {
        let path = folder.join("tokenizer.json");
        Vocabulary(Some(Arc::new(File { path, tokens: OnceLock::new() })))
    }

    /// The token of exactly this text, as `tokenizer.json` writes it, where there is one.
    ///
    /// # Errors
    /// The operating system's where the file is missing; [`Error::ModelConfig`] where the file is not of the known form.
    pub fn token(&self, text: &str) -> Result<Option<u32>> {
        let Some(file) = &self.0 else { return Ok(None) };
        match file.tokens.get_or_init(|| read(&file.path)) {
            Ok(tokens) => Ok(tokens.get(text).copied()),
            Err(error) => Err(error.clone()),
        }
    }
}

/// Vocabularies of one file.
impl PartialEq for Vocabulary {
    fn eq(&self, other: &Vocabulary) -> bool {
        let path = |vocabulary: &Vocabulary| vocabulary.0.as_ref().map(|file| file.path.clone());
        path(self) == path(other)
    }
}

fn read(path: &Path) -> Result<HashMap<String, u32>> {
    #[derive(Deserialize)]
    struct Contents {
        #[serde(default)]
        added_tokens: Vec<AddedToken>,
        model: Option<ModelVocabulary>,
    }
    #[derive(Deserialize)]
    struct AddedToken {
        id: u32,
        content: String,
    }
    #[derive(Deserialize)]
    struct ModelVocabulary {
        #[serde(default)]
        vocab: Value,
    }
    let text = std::fs::read(path).map_err(|error| Error::io(path, error))?;
    let contents: Contents = serde_json::from_slice(&text).map_err(|error| Error::ModelConfig {
        path: path.to_path_buf(),
        reason: error.to_string(),
    })?;
    let mut vocabulary = HashMap::new();
    match contents.model.map(|model| model.vocab) {
        // Byte-pair and word-level models map texts to numbers, unigram models list pairs.
        Some(Value::Object(entries)) => {
            let number =
                |(text, id): (String, Value)| Some((text, id.as_u64()?.min(LARGEST_TOKEN) as u32));
            vocabulary.extend(entries.into_iter().filter_map(number));
        }
        Some(Value::Array(entries)) => {
            let texts = entries.into_iter().enumerate();
            let number =
                |(id, entry): (usize, Value)| Some((entry[0].as_str()?.to_string(), id as u32));
            vocabulary.extend(texts.filter_map(number));
        }
        _ => {}
    }
    vocabulary.extend(contents.added_tokens.into_iter().map(|token| (token.content, token.id)));
    Ok(vocabulary)
}
