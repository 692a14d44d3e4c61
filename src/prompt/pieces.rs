//! The parts of a prompt, each of which becomes tokens on its own.

use serde::Deserialize;
use serde_json::{Map, Value, json};

use super::source::Source;
use super::text::{Template, Text};
use super::tokens::TokensEntry;
use crate::error::{Error, Result};

/// Which side of too many tokens is cut.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Cut {
    /// The first tokens go.
    #[default]
    Start,
    /// The last tokens go.
    End,
}

/// The most tokens that something may have, and the side that is cut where it has more.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limit {
    max_tokens: usize,
    cut: Cut,
}

impl Limit {
    pub(super) fn new(max_tokens: usize, cut: Cut) -> Limit {
        Limit { max_tokens, cut }
    }

    /// Cuts what was added to `tokens` since it had `start`.
    pub(super) fn apply(&self, tokens: &mut Vec<u32>, start: usize) {
        let excess = (tokens.len() - start).saturating_sub(self.max_tokens);
        match self.cut {
            Cut::Start => drop(tokens.drain(start..start + excess)),
            Cut::End => tokens.truncate(tokens.len() - excess),
        }
    }
}

/// A part of a prompt.
#[derive(Debug, Clone, PartialEq)]
pub enum Piece {
    /// Tokens as they are.
    Tokens(Vec<u32>),
    /// A text, encoded as a whole: semantic IDs in it are texts as well.
    Text {
        /// What it says.
        template: Template,
        /// Whether it has the tokens that the tokenizer puts around every text.
        special_tokens: bool,
        /// What it may have at most.
        limit: Option<Limit>,
    },
    /// The items of the history, one after the other. The tokens of their semantic IDs are the
    /// layout's own.
    Items {
        /// What each item says.
        item: Vec<ItemPart>,
        /// Tokens between two items.
        separator: Vec<u32>,
        /// Whether `separator` stands after the last item as well.
        is_separator_trailing: bool,
    },
    /// Messages, as the model's chat template writes them.
    Messages {
        /// Roles with what they say.
        messages: Vec<(String, Template)>,
        /// The chat template's own variables, before those of the request.
        variables: Map<String, Value>,
    },
    /// One token for the user, whose name is a number.
    User {
        /// The token of bin 0.
        first_token: u32,
        /// How many such tokens there are; the user's number is taken modulo it.
        bins: u32,
    },
}

/// A part of what an item says.
#[derive(Debug, Clone, PartialEq)]
pub enum ItemPart {
    /// The tokens of its semantic ID.
    Sid,
    /// Tokens that are the same for all items.
    Tokens(Vec<u32>),
    /// A text that depends on the item: its title, its number in the history.
    Text(Template),
}

/// A piece as `sidereal.json` writes it.
#[derive(Debug, Clone, Deserialize)]
#[serde(
    untagged,
    expecting = "expected a piece: a text, or an object with one of \"text\", \"tokens\", \"items\", \"messages\" and \"user\""
)]
pub(super) enum PieceEntry {
    Plain(String),
    Text(TextEntry),
    Tokens(PlainTokens),
    Items(ItemsEntry),
    Messages(MessagesEntry),
    User(UserEntry),
}

#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct TextEntry {
    text: String,
    #[serde(default)]
    special_tokens: bool,
    max_tokens: Option<usize>,
    #[serde(default)]
    cut: Cut,
}

#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct PlainTokens {
    tokens: TokensEntry,
}

#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct ItemsEntry {
    items: String,
    #[serde(default)]
    separator: TokensEntry,
    #[serde(default)]
    trailing_separator: bool,
}

#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct MessagesEntry {
    messages: Vec<MessageEntry>,
    #[serde(default)]
    variables: Map<String, Value>,
}

#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
struct MessageEntry {
    role: String,
    content: String,
}

#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct UserEntry {
    user: UserBins,
}

#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
struct UserBins {
    first_token: u32,
    bins: std::num::NonZeroU32,
}

impl PieceEntry {
    /// The piece; `text` is the model folder's.
    ///
    /// # Errors
    /// What is wrong with a template, or a text that cannot become tokens.
    pub fn resolve(self, text: &Text) -> Result<Piece> {
        let template = |source: &str| {
            Template::prompt(source).map_err(|reason| Error::InvalidOption {
                option: "prompt",
                reason: format!("the template {source:?} cannot be read: {reason}"),
            })
        };
        Ok(match self {
            PieceEntry::Plain(source) => {
                Piece::Text { template: template(&source)?, special_tokens: false, limit: None }
            }
            PieceEntry::Text(TextEntry { text, special_tokens, max_tokens, cut }) => Piece::Text {
                template: template(&text)?,
                special_tokens,
                limit: max_tokens.map(|max_tokens| Limit::new(max_tokens, cut)),
            },
            PieceEntry::Tokens(PlainTokens { tokens }) => Piece::Tokens(tokens.resolve(text)?),
            PieceEntry::Items(ItemsEntry { items, separator, trailing_separator }) => {
                Piece::Items {
                    item: item_parts(&items, text, template)?,
                    separator: separator.resolve(text)?,
                    is_separator_trailing: trailing_separator,
                }
            }
            PieceEntry::Messages(MessagesEntry { messages, variables }) => Piece::Messages {
                messages: messages
                    .into_iter()
                    .map(|message| Ok((message.role, template(&message.content)?)))
                    .collect::<Result<_>>()?,
                variables,
            },
            PieceEntry::User(UserEntry { user }) => {
                Piece::User { first_token: user.first_token, bins: user.bins.get() }
            }
        })
    }
}

/// Takes an item's template apart at `{{ sid }}`, so that what stands around it is encoded alone.
fn item_parts(
    source: &str,
    text: &Text,
    template: impl Fn(&str) -> Result<Template>,
) -> Result<Vec<ItemPart>> {
    let mut parts = Vec::new();
    let around = |part: &str| -> Result<Option<ItemPart>> {
        Ok(match part {
            "" => None,
            _ if part.contains("{{") || part.contains("{%") => {
                Some(ItemPart::Text(template(part)?))
            }
            _ => Some(ItemPart::Tokens(text.tokens(part, false)?.to_vec())),
        })
    };
    let mut rest = source;
    let mut from = 0;
    while let Some(start) = rest[from..].find("{{").map(|start| from + start) {
        let Some(len) = rest[start..].find("}}") else { break };
        if rest[start + 2..start + len].trim() == "sid" {
            parts.extend(around(&rest[..start])?);
            parts.push(ItemPart::Sid);
            (rest, from) = (&rest[start + len + 2..], 0);
        } else {
            from = start + len + 2;
        }
    }
    parts.extend(around(rest)?);
    Ok(parts)
}

impl Piece {
    /// The items' semantic IDs and nothing else.
    pub fn items(separator: Vec<u32>) -> Piece {
        Piece::Items { item: vec![ItemPart::Sid], separator, is_separator_trailing: false }
    }

    /// Whether it has a text that depends on the request.
    pub(super) fn reads_text(&self) -> bool {
        match self {
            Piece::Tokens(_) | Piece::User { .. } => false,
            Piece::Text { .. } | Piece::Messages { .. } => true,
            Piece::Items { item, .. } => item.iter().any(|part| matches!(part, ItemPart::Text(_))),
        }
    }

    /// Tokens that stand in every prompt.
    pub(super) fn fixed_tokens(&self) -> Vec<u32> {
        match self {
            Piece::Tokens(tokens) => tokens.clone(),
            Piece::Items { item, separator, .. } => {
                let of_part = |part: &ItemPart| match part {
                    ItemPart::Tokens(tokens) => tokens.clone(),
                    _ => Vec::new(),
                };
                item.iter().flat_map(of_part).chain(separator.iter().copied()).collect()
            }
            Piece::User { first_token, bins } => vec![first_token.saturating_add(bins - 1)],
            Piece::Text { .. } | Piece::Messages { .. } => Vec::new(),
        }
    }

    /// Adds the tokens of a request.
    ///
    /// # Errors
    /// The request's; those of its text.
    pub(super) fn render(
        &self,
        source: &Source<'_>,
        text: &Text,
        tokens: &mut Vec<u32>,
    ) -> Result<()> {
        match self {
            Piece::Tokens(fixed) => tokens.extend_from_slice(fixed),
            Piece::Text { template, special_tokens, limit } => {
                let start = tokens.len();
                let rendered = fill(template, &Value::Object(source.variables(text)?))?;
                tokens.extend_from_slice(&text.tokens(&rendered, *special_tokens)?);
                if let Some(limit) = limit {
                    limit.apply(tokens, start);
                }
            }
            Piece::Items { item, separator, is_separator_trailing } => {
                for place in 0..source.items.len() {
                    if place > 0 {
                        tokens.extend_from_slice(separator);
                    }
                    for part in item {
                        match part {
                            ItemPart::Sid => tokens.extend(source.sid_tokens(place)),
                            ItemPart::Tokens(fixed) => tokens.extend_from_slice(fixed),
                            ItemPart::Text(template) => {
                                let rendered = fill(template, &source.item(place, None))?;
                                tokens.extend_from_slice(&text.tokens(&rendered, false)?);
                            }
                        }
                    }
                }
                if *is_separator_trailing && !source.items.is_empty() {
                    tokens.extend_from_slice(separator);
                }
            }
            Piece::Messages { messages, variables } => {
                let own = Value::Object(source.variables(text)?);
                let message = |(role, template): &(String, Template)| {
                    Ok(json!({"role": role, "content": fill(template, &own)?}))
                };
                let messages = messages.iter().map(message).collect::<Result<Vec<Value>>>()?;
                let mut variables = variables.clone();
                variables.extend(source.request.variables.clone());
                let rendered = text.chat(&messages, &variables)?;
                tokens.extend_from_slice(&text.tokens(&rendered, false)?);
            }
            Piece::User { first_token, bins } => tokens.push(first_token + source.user_bin(*bins)?),
        }
        Ok(())
    }
}

fn fill(template: &Template, variables: &Value) -> Result<String> {
    template.render(variables).map_err(|reason| Error::InvalidField {
        field: "variables",
        reason: format!("the model's prompt template: {reason}"),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_side_that_is_cut_is_the_one_that_is_named() {
        let cut = |cut| {
            let mut tokens = vec![9, 1, 2, 3, 4];
            Limit::new(2, cut).apply(&mut tokens, 1);
            tokens
        };
        assert_eq!(cut(Cut::Start), [9, 3, 4]);
        assert_eq!(cut(Cut::End), [9, 1, 2]);
    }

    #[test]
    fn an_item_is_taken_apart_at_its_semantic_id() {
        let parts = item_parts("{{ number }}. {{sid}}", &Text::default(), |source| {
            Template::prompt(source).map_err(|reason| Error::MalformedRequest { reason })
        });
        let parts = parts.expect("a template");
        assert!(matches!(&parts[..], [ItemPart::Text(_), ItemPart::Sid]), "{parts:?}");
    }
}
