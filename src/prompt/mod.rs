//! How a request's input becomes the model's tokens.
//!
//! A prompt is a list of [`Piece`]s, each encoded on its own. `sidereal.json` describes it
//! ([`PromptEntry`]); [`projects`] has the prompts of published projects under their names.

use serde::Deserialize;
use serde_json::Value;

use crate::error::{Error, Result};
use crate::json;
use crate::request::{Input, Request};

mod phrases;
mod pieces;
pub mod projects;
mod source;
#[cfg(feature = "text")]
mod template;
#[cfg(feature = "text")]
mod text;
mod tokens;
#[cfg(not(feature = "text"))]
mod without_text;
#[cfg(not(feature = "text"))]
use without_text as text;

pub use phrases::{PhraseLayout, PhrasesEntry};
use pieces::PieceEntry;
pub use pieces::{Cut, ItemPart, Limit, Piece};
pub use source::Source;
pub use text::{Template, Text};
pub use tokens::TokensEntry;

/// How a history becomes the model's input, and how texts do.
#[derive(Debug, Clone, PartialEq)]
pub struct Prompt {
    pieces: Vec<Piece>,
    /// The newest items that are kept; all where absent.
    pub max_items: Option<usize>,
    max_tokens: Option<(usize, CutPrompt)>,
    text: Text,
}

/// What goes where a prompt has too many tokens.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize)]
#[serde(rename_all = "lowercase")]
enum CutPrompt {
    /// The oldest items, as a whole.
    #[default]
    Items,
    /// The first tokens.
    Start,
    /// The last tokens.
    End,
}

/// A prompt as `sidereal.json` writes it: `prefix`, `separator` and `suffix` around the items'
/// codes, or `pieces`.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct PromptEntry {
    prefix: TokensEntry,
    suffix: TokensEntry,
    separator: TokensEntry,
    pieces: Option<Vec<Value>>,
    max_items: Option<usize>,
    max_tokens: Option<usize>,
    cut: CutPrompt,
}

impl PromptEntry {
    /// The items, and one token after them.
    pub fn with_suffix(token: u32) -> PromptEntry {
        PromptEntry { suffix: TokensEntry::token(token), ..PromptEntry::default() }
    }
}

/// The tokens of a history.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rendered {
    /// The model's input.
    pub tokens: Vec<u32>,
    /// The items that are in it, the newest of those given.
    pub num_items: usize,
}

impl Default for Prompt {
    /// The items' codes and nothing else.
    fn default() -> Prompt {
        Prompt::new(Vec::new(), Vec::new(), Vec::new())
    }
}

impl Prompt {
    /// A prompt of tokens before the first item, between two items, and after the last one.
    pub fn new(prefix: Vec<u32>, separator: Vec<u32>, suffix: Vec<u32>) -> Prompt {
        let pieces = vec![Piece::Tokens(prefix), Piece::items(separator), Piece::Tokens(suffix)];
        Prompt { pieces, max_items: None, max_tokens: None, text: Text::default() }
    }

    /// A prompt as a file writes it; `text` is the model folder's.
    ///
    /// # Errors
    /// What is wrong with it, as [`Error::InvalidOption`]; those of its texts.
    pub fn read(entry: PromptEntry, text: Text) -> Result<Prompt> {
        let invalid = |reason: String| Error::InvalidOption { option: "prompt", reason };
        let PromptEntry { prefix, suffix, separator, pieces, max_items, max_tokens, cut } = entry;
        if max_items == Some(0) {
            return Err(invalid("\"max_items\" must be at least 1".into()));
        }
        if max_tokens == Some(0) {
            return Err(invalid("\"max_tokens\" must be at least 1".into()));
        }
        let has_around = !(prefix.is_empty() && suffix.is_empty() && separator.is_empty());
        let pieces = match pieces {
            Some(_) if has_around => {
                let reason = "\"pieces\" stands for \"prefix\", \"separator\" and \"suffix\"; give \
                              either";
                return Err(invalid(reason.into()));
            }
            Some(pieces) => {
                let piece = |(number, piece): (usize, Value)| {
                    let entry: PieceEntry = json::from_value(piece)
                        .map_err(|reason| invalid(format!("piece {number}: {reason}")))?;
                    entry.resolve(&text)
                };
                pieces.into_iter().enumerate().map(piece).collect::<Result<Vec<Piece>>>()?
            }
            None => vec![
                Piece::Tokens(prefix.resolve(&text)?),
                Piece::items(separator.resolve(&text)?),
                Piece::Tokens(suffix.resolve(&text)?),
            ],
        };
        let max_tokens = max_tokens.map(|max| (max, cut));
        Ok(Prompt { pieces, max_items, max_tokens, text })
    }

    /// The texts of the model folder.
    pub fn text(&self) -> &Text {
        &self.text
    }

    /// Whether a history's tokens need the tokenizer.
    pub fn reads_text(&self) -> bool {
        self.pieces.iter().any(Piece::reads_text)
    }

    /// Tokens that stand in every prompt, to be checked against the vocabulary.
    pub fn fixed_tokens(&self) -> Vec<u32> {
        self.pieces.iter().flat_map(Piece::fixed_tokens).collect()
    }

    /// The tokens of a history. Where they are more than `room` or than the prompt may have, the
    /// oldest items are left out, or the side that the prompt names is cut. The newest item always
    /// stays.
    ///
    /// # Errors
    /// The request's: a variable that a template needs and the request does not give; those of
    /// texts.
    pub fn render(&self, source: &Source<'_>, room: usize) -> Result<Rendered> {
        let all = source.items;
        let newest = |num_items: usize| {
            let items = &all[all.len() - num_items..];
            let source = Source { items, ..*source };
            let mut tokens = Vec::new();
            for piece in &self.pieces {
                piece.render(&source, &self.text, &mut tokens)?;
            }
            Ok(Rendered { tokens, num_items })
        };
        let mut rendered: Rendered = newest(all.len())?;
        let max = match self.max_tokens {
            Some((max, cut @ (CutPrompt::Start | CutPrompt::End))) => {
                let cut = if cut == CutPrompt::End { Cut::End } else { Cut::Start };
                Limit::new(max.min(room), cut).apply(&mut rendered.tokens, 0);
                return Ok(rendered);
            }
            Some((max, CutPrompt::Items)) => max.min(room),
            None => room,
        };
        if rendered.tokens.len() <= max {
            return Ok(rendered);
        }
        // More items are never fewer tokens: the most that fit are found by halving. The newest item
        // stays: a prompt without any would be another user's.
        let (mut fits, mut too_many) = (newest(all.len().min(1))?, all.len());
        while fits.num_items + 1 < too_many {
            rendered = newest(fits.num_items.midpoint(too_many))?;
            match rendered.tokens.len() <= max {
                true => fits = rendered,
                false => too_many = rendered.num_items,
            }
        }
        Ok(fits)
    }

    /// The tokens of a text or of messages, where the request's input is one.
    ///
    /// # Errors
    /// Those of texts; [`Error::InvalidField`] where the chat template refuses the messages.
    pub fn text_tokens(&self, request: &Request) -> Result<Option<Vec<u32>>> {
        let (text, special_tokens) = match &request.input {
            Input::Text(text) => (text.clone(), request.special_tokens.unwrap_or(true)),
            Input::Messages(messages) => {
                let text = self.text.chat(messages, &request.variables)?;
                (text, request.special_tokens.unwrap_or(false))
            }
            Input::History(_) | Input::Tokens(_) => return Ok(None),
        };
        Ok(Some(self.text.tokens(&text, special_tokens)?.to_vec()))
    }
}
