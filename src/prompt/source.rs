//! What a prompt is made from: the items of a history, and the request.

use serde_json::{Map, Value, json};

use super::text::Text;
use crate::backend::NO_TOKEN;
use crate::catalog::Snapshot;
use crate::error::{Error, Result};
use crate::request::Request;

/// The items of a history with what the catalog knows of them, and the request that names them.
pub struct Source<'a> {
    /// By the catalog's numbers, oldest first.
    pub items: &'a [u32],
    /// Where the items are looked up.
    pub snapshot: &'a Snapshot,
    /// By level and code: the token.
    pub levels: &'a [Vec<u32>],
    /// Fields that templates may name.
    pub request: &'a Request,
}

impl Source<'_> {
    /// The tokens of an item's semantic ID, by its place in the history.
    pub(super) fn sid_tokens(&self, place: usize) -> impl Iterator<Item = u32> {
        let sid = self.snapshot.sid(self.items[place]);
        let levels = self.levels.iter().zip(sid.codes().to_vec());
        // A code without a token, which the catalog refuses, would be out of the vocabulary.
        levels.map(|(tokens, code)| tokens.get(usize::from(code)).copied().unwrap_or(NO_TOKEN))
    }

    /// What a template may say of an item.
    pub(super) fn item(&self, place: usize, sid: Option<String>) -> Value {
        let item = self.items[place];
        let mut variables = json!({
            "item": self.snapshot.name(item),
            "title": self.snapshot.title(item).unwrap_or_default(),
            "number": place + 1,
        });
        if let Some(sid) = sid {
            variables["sid"] = sid.into();
        }
        variables
    }

    /// What a template of the whole history may say: `items`, `user`, the request's own variables,
    /// and the tokenizer's special tokens by their names.
    pub(super) fn variables(&self, text: &Text) -> Result<Map<String, Value>> {
        let vocabulary = text.vocabulary();
        let mut items = Vec::with_capacity(self.items.len());
        for place in 0..self.items.len() {
            let texts = self.sid_tokens(place).map(|token| vocabulary.text(token).ok().flatten());
            // Without texts of tokens a template may still name titles.
            let sid = texts.collect::<Option<String>>();
            items.push(self.item(place, sid));
        }
        let mut variables = text.special_tokens()?.clone();
        variables.extend(self.request.variables.clone());
        variables.insert("items".into(), items.into());
        if let Some(user) = &self.request.user {
            variables.insert("user".into(), user.clone().into());
        }
        Ok(variables)
    }

    /// The user's number modulo `bins`.
    pub(super) fn user_bin(&self, bins: u32) -> Result<u32> {
        let invalid = |reason: String| Error::InvalidField { field: "user", reason };
        let user = self.request.user.as_ref();
        let user = user
            .ok_or_else(|| invalid("the model's prompt has a row for the user; name one".into()))?;
        let number: u64 = user.parse().map_err(|_| {
            invalid(format!("{user:?} is not a number, and the model's prompt has a row by number"))
        })?;
        Ok((number % u64::from(bins)) as u32)
    }
}
