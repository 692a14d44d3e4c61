//! Text to tokens: the tokenizer of a model folder, its special tokens and its chat template.
//!
//! Everything comes from files of the folder, and nothing is downloaded: `tokenizer.json`,
//! `chat_template.jinja`, `tokenizer_config.json` and `special_tokens_map.json`. They are read when a
//! text is first asked for. Tokens of short texts are kept, so the title of an item that comes again
//! is not taken apart again.

use std::fmt;
use std::num::NonZeroUsize;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use lru::LruCache;
use serde_json::{Map, Value};
use tokenizers::Tokenizer;

pub use super::template::Template;
use crate::error::{Error, Result};
use crate::json;
use crate::models::vocabulary::Vocabulary;

/// The longest text that is taken apart, in bytes.
const MAX_TEXT_BYTES: usize = 1 << 22;
/// The longest text whose tokens are kept, in bytes.
const MAX_KEPT_BYTES: usize = 512;
/// Texts whose tokens are kept.
const MAX_KEPT_TEXTS: NonZeroUsize = NonZeroUsize::new(1 << 14).expect("not zero");

/// Files of tokenizers that this crate does not read.
const SLOW_TOKENIZERS: [&str; 5] =
    ["tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "vocab.json", "vocab.txt"];

/// The special tokens that a tokenizer's configuration names.
const SPECIAL_TOKENS: [&str; 7] =
    ["bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token"];

/// The texts of a model folder. Clones share what was read. The default has no folder.
#[derive(Clone, Default)]
pub struct Text(Option<Arc<Folder>>);

struct Folder {
    path: PathBuf,
    vocabulary: Vocabulary,
    tokenizer: OnceLock<Result<Tokenizer>>,
    special_tokens: OnceLock<Result<Map<String, Value>>>,
    chat: OnceLock<Result<Template>>,
    kept: Mutex<KeptTexts>,
}

/// Tokens by text, with the tokens that stand around every text or without them.
type KeptTexts = LruCache<(String, bool), Arc<[u32]>>;

impl Text {
    /// The texts of a model folder.
    pub fn of_folder(folder: &Path, vocabulary: Vocabulary) -> Text {
        Text(Some(Arc::new(Folder {
            path: folder.to_path_buf(),
            vocabulary,
            tokenizer: OnceLock::new(),
            special_tokens: OnceLock::new(),
            chat: OnceLock::new(),
            kept: Mutex::new(LruCache::new(MAX_KEPT_TEXTS)),
        })))
    }

    /// The vocabulary of the folder.
    pub fn vocabulary(&self) -> Vocabulary {
        self.0.as_ref().map(|folder| folder.vocabulary.clone()).unwrap_or_default()
    }

    /// The tokens of a text. With `special_tokens`, those that the tokenizer puts around every text
    /// come with it.
    ///
    /// # Errors
    /// [`Error::LimitExceeded`]; [`Error::Unsupported`] without a `tokenizer.json`, with the way to
    /// make one; [`Error::ModelConfig`] where that file is not sound.
    pub fn tokens(&self, text: &str, special_tokens: bool) -> Result<Arc<[u32]>> {
        let folder = self.folder()?;
        if text.len() > MAX_TEXT_BYTES {
            let (len, max) = (text.len(), MAX_TEXT_BYTES);
            return Err(Error::LimitExceeded { what: "bytes of text", len, max });
        }
        if text.len() > MAX_KEPT_BYTES {
            return folder.encode(text, special_tokens);
        }
        let kept = || folder.kept.lock().unwrap_or_else(PoisonError::into_inner);
        let key = (text.to_string(), special_tokens);
        if let Some(tokens) = kept().get(&key) {
            return Ok(Arc::clone(tokens));
        }
        let tokens = folder.encode(text, special_tokens)?;
        kept().put(key, Arc::clone(&tokens));
        Ok(tokens)
    }

    /// The tokens of a text that is asked for once: they are not kept.
    ///
    /// # Errors
    /// Those of [`tokens`](Text::tokens).
    pub(super) fn encode(&self, text: &str) -> Result<Arc<[u32]>> {
        let folder = self.folder()?;
        if text.len() > MAX_TEXT_BYTES {
            let (len, max) = (text.len(), MAX_TEXT_BYTES);
            return Err(Error::LimitExceeded { what: "bytes of text", len, max });
        }
        folder.encode(text, false)
    }

    /// The tokens of a text that does not depend on a request. An added token needs no tokenizer.
    pub(super) fn fixed_tokens(&self, text: &str) -> Result<Vec<u32>> {
        let rendered = match text.contains("{{") || text.contains("{%") {
            true => self.render_fixed(text)?,
            false => text.to_string(),
        };
        let folder = self.folder()?;
        let added = folder.vocabulary.added().unwrap_or_default();
        let added = added.iter().find(|(_, text)| *text == rendered);
        match added {
            Some(&(token, _)) => Ok(vec![token]),
            None => Ok(self.tokens(&rendered, false)?.to_vec()),
        }
    }

    fn render_fixed(&self, text: &str) -> Result<String> {
        let failed = |reason| Error::InvalidOption { option: "a text in sidereal.json", reason };
        let template = Template::prompt(text).map_err(failed)?;
        let known = self.special_tokens()?;
        template.render(known).map_err(|reason| {
            let names = known.keys().map(String::as_str).collect::<Vec<_>>().join(", ");
            failed(format!(
                "{text:?}: {reason}; the tokenizer's files name these tokens: [{names}]"
            ))
        })
    }

    /// A text that has these tokens.
    ///
    /// # Errors
    /// Those of [`tokens`](Text::tokens).
    pub fn decode(&self, tokens: &[u32]) -> Result<String> {
        let folder = self.folder()?;
        let tokenizer = folder.tokenizer()?;
        let decoded = catch_unwind(AssertUnwindSafe(|| tokenizer.decode(tokens, false)));
        match decoded {
            Ok(Ok(text)) => Ok(text),
            Ok(Err(error)) => Err(folder.unsound(&error.to_string())),
            Err(_) => Err(folder.unsound("it cannot be used to decode tokens")),
        }
    }

    /// Whether the folder has a tokenizer that [`tokens`](Text::tokens) can use.
    pub fn has_tokenizer(&self) -> bool {
        self.0.as_ref().is_some_and(|folder| folder.path.join("tokenizer.json").exists())
    }

    /// The special tokens by their names, `bos_token` and so on; those that are not set are absent.
    ///
    /// # Errors
    /// [`Error::ModelConfig`] where a file is not JSON; the operating system's.
    pub fn special_tokens(&self) -> Result<&Map<String, Value>> {
        let folder = self.folder()?;
        folder
            .special_tokens
            .get_or_init(|| folder.read_special_tokens())
            .as_ref()
            .map_err(Clone::clone)
    }

    /// What the folder's chat template makes of messages. `variables` are the template's own, such
    /// as `enable_thinking`; `add_generation_prompt` is true where they do not say.
    ///
    /// # Errors
    /// [`Error::InvalidField`] where the template refuses the messages; [`Error::Unsupported`]
    /// where the folder has none.
    pub fn chat(&self, messages: &[Value], variables: &Map<String, Value>) -> Result<String> {
        let folder = self.folder()?;
        let template = folder.chat.get_or_init(|| folder.read_chat_template());
        let template = template.as_ref().map_err(Clone::clone)?;
        let mut all = self.special_tokens()?.clone();
        all.insert("add_generation_prompt".into(), Value::Bool(true));
        // Templates ask whether they are none, as transformers passes them.
        all.extend(["tools", "documents"].map(|name| (name.to_string(), Value::Null)));
        all.extend(variables.iter().map(|(name, value)| (name.clone(), value.clone())));
        all.insert("messages".into(), Value::Array(messages.to_vec()));
        template.render(&all).map_err(|reason| Error::InvalidField {
            field: "messages",
            reason: format!("the model's chat template: {reason}"),
        })
    }

    fn folder(&self) -> Result<&Arc<Folder>> {
        self.0.as_ref().ok_or_else(|| Error::Unsupported {
            what: "text for a model without a folder".into(),
            way_out: "give \"tokens\"".into(),
        })
    }
}

impl Folder {
    fn encode(&self, text: &str, special_tokens: bool) -> Result<Arc<[u32]>> {
        let tokenizer = self.tokenizer()?;
        // A file that nobody could have written may make the tokenizer panic.
        match catch_unwind(AssertUnwindSafe(|| tokenizer.encode_fast(text, special_tokens))) {
            Ok(Ok(encoding)) => Ok(encoding.get_ids().into()),
            Ok(Err(error)) => Err(self.unsound(&error.to_string())),
            Err(_) => Err(self.unsound("it cannot be used to encode a text")),
        }
    }

    fn tokenizer(&self) -> Result<&Tokenizer> {
        self.tokenizer.get_or_init(|| self.read_tokenizer()).as_ref().map_err(Clone::clone)
    }

    fn read_tokenizer(&self) -> Result<Tokenizer> {
        let path = self.path.join("tokenizer.json");
        let contents = match std::fs::read(&path) {
            Ok(contents) => contents,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                return Err(self.no_tokenizer());
            }
            Err(error) => return Err(Error::io(&path, error)),
        };
        let read = catch_unwind(|| Tokenizer::from_bytes(contents));
        let mut tokenizer = match read {
            Ok(Ok(tokenizer)) => tokenizer,
            Ok(Err(error)) => return Err(self.unsound(&error.to_string())),
            Err(_) => return Err(self.unsound("it is not a tokenizer that can be built")),
        };
        // How training cut and padded its batches says nothing about a request.
        tokenizer.with_padding(None);
        tokenizer.with_truncation(None).map_err(|error| self.unsound(&error.to_string()))?;
        Ok(tokenizer)
    }

    fn no_tokenizer(&self) -> Error {
        let folder = self.path.display();
        let slow = SLOW_TOKENIZERS.into_iter().find(|name| self.path.join(name).exists());
        let what = match slow {
            Some(name) => format!("text with {name} and no tokenizer.json in {folder}"),
            None => format!("text without a tokenizer.json in {folder}"),
        };
        Error::Unsupported {
            what,
            way_out: format!(
                "make that file by `python3 -c \"from transformers import AutoTokenizer; \
                 AutoTokenizer.from_pretrained('{folder}').save_pretrained('{folder}')\"`, or give \
                 \"history\" or \"tokens\" with a prompt that has no text"
            ),
        }
    }

    fn unsound(&self, reason: &str) -> Error {
        let reason = format!("{reason}; save it again with transformers' save_pretrained");
        Error::ModelConfig { path: self.path.join("tokenizer.json"), reason }
    }

    /// A JSON object of the folder, empty where the file is not there.
    fn object(&self, name: &str) -> Result<Map<String, Value>> {
        let path = self.path.join(name);
        match std::fs::read(&path) {
            Ok(contents) => {
                json::parse_bytes(&contents).map_err(|reason| Error::ModelConfig { path, reason })
            }
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(Map::new()),
            Err(error) => Err(Error::io(&path, error)),
        }
    }

    fn read_special_tokens(&self) -> Result<Map<String, Value>> {
        let mut tokens = Map::new();
        // The configuration stands before the map, which transformers 5 no longer writes.
        for file in ["special_tokens_map.json", "tokenizer_config.json"] {
            let contents = self.object(file)?;
            for name in SPECIAL_TOKENS {
                let value = contents.get(name);
                // A token is a text, or an object that holds it.
                let content = value.and_then(|value| value.get("content").or(Some(value)));
                if let Some(text) = content.and_then(Value::as_str) {
                    tokens.insert(name.into(), text.into());
                }
            }
        }
        Ok(tokens)
    }

    fn read_chat_template(&self) -> Result<Template> {
        let file = self.path.join("chat_template.jinja");
        let source = match std::fs::read_to_string(&file) {
            Ok(source) => Some((file, source)),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                let config = self.object("tokenizer_config.json")?;
                let named = |templates: &Vec<Value>| {
                    let default = templates.iter().find(|entry| entry["name"] == "default")?;
                    default["template"].as_str().map(str::to_string)
                };
                let source = match config.get("chat_template") {
                    Some(Value::String(source)) => Some(source.clone()),
                    Some(Value::Array(templates)) => named(templates),
                    _ => None,
                };
                source.map(|source| (self.path.join("tokenizer_config.json"), source))
            }
            Err(error) => return Err(Error::io(&file, error)),
        };
        let (path, source) = source.ok_or_else(|| Error::Unsupported {
            what: format!(
                "\"messages\" for a model without a chat template in {}",
                self.path.display()
            ),
            way_out: "give \"text\", or put chat_template.jinja into the model folder".into(),
        })?;
        Template::chat(&source).map_err(|reason| {
            let reason = format!("the chat template cannot be read: {reason}");
            Error::ModelConfig { path, reason }
        })
    }
}

/// Texts of one folder.
impl PartialEq for Text {
    fn eq(&self, other: &Text) -> bool {
        let path = |text: &Text| text.0.as_ref().map(|folder| folder.path.clone());
        path(self) == path(other)
    }
}

impl fmt::Debug for Text {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let path = self.0.as_ref().map(|folder| &folder.path);
        formatter.debug_tuple("Text").field(&path).finish()
    }
}
