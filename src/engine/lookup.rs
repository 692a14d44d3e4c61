//! Which items a request names and allows, and which of its names the catalog does not have.
//!
//! Names come from logs, feature stores and other replicas, which know items that the catalog has no
//! longer or not yet. Such names are left out and told, unless the request wants an error for them.

use std::io::ErrorKind;

use crate::answer::{UnknownByField, UnknownNames};
use crate::catalog::Snapshot;
use crate::catalog::allowed::AllowedSet;
use crate::catalog::filter::Filter;
use crate::error::{Error, Result};
use crate::models::vocabulary::Vocabulary;
use crate::request::{Input, NamedToken, Request, UnknownItems};

/// The items of some names.
pub(crate) struct Known {
    /// Item numbers in the order of the names, repetitions included.
    pub items: Vec<u32>,
    /// The names of no item.
    pub unknown: UnknownNames,
}

impl Known {
    /// Looks names up, and leaves out those that the catalog does not have.
    pub fn of(names: &[String], snapshot: &Snapshot) -> Known {
        let mut unknown = UnknownNames::default();
        let find = |name: &String| {
            let found = snapshot.find(name);
            if found.is_none() {
                unknown.push(name);
            }
            found
        };
        let items = names.iter().filter_map(find).collect();
        Known { items, unknown }
    }

    /// Looks the names of a field up as a request wants it.
    ///
    /// # Errors
    /// [`Error::UnknownItem`] with the first unknown name where the request wants an error for it, or
    /// where it names items and none of them is known.
    pub fn required(
        field: &'static str,
        names: &[String],
        snapshot: &Snapshot,
        unknown_items: UnknownItems,
    ) -> Result<Known> {
        let known = Known::of(names, snapshot);
        let is_enough = match unknown_items {
            UnknownItems::Skip => !known.items.is_empty(),
            UnknownItems::Error => false,
        };
        match known.unknown.names.first() {
            Some(item) if !is_enough => Err(Error::UnknownItem { field, item: item.clone() }),
            _ => Ok(known),
        }
    }

    /// The items, ascending, each once.
    pub fn into_sorted(self) -> Vec<u32> {
        let mut items = self.items;
        items.sort_unstable();
        items.dedup();
        items
    }
}

/// What a request wants its searches to find, by the catalog's numbers.
pub(crate) struct Wishes {
    /// Ascending, each once.
    pub excluded: Vec<u32>,
    /// Ascending, each once; `None` for all.
    pub only: Option<Vec<u32>>,
    /// By search.
    pub filters: Vec<Option<String>>,
}

impl Wishes {
    /// The wishes of a request.
    ///
    /// # Errors
    /// [`Error::InvalidField`] for a filter that says nothing or that cannot be read.
    pub fn of(
        request: &Request,
        snapshot: &Snapshot,
        unknown_items: &mut UnknownByField,
    ) -> Result<Wishes> {
        check_filters(request)?;
        let excluded = excluded(request, snapshot)?;
        let only = request.only.as_ref().map(|names| {
            let mut known = Known::of(names, snapshot);
            unknown_items.only = std::mem::take(&mut known.unknown);
            known.into_sorted()
        });
        let of_group = |group: &String| match &request.filter {
            Some(filter) => Ok(Some(Filter::both(filter, group)?)),
            None => Ok(Some(group.clone())),
        };
        let filters = match request.groups.is_empty() {
            true => vec![request.filter.clone()],
            false => request.groups.iter().map(of_group).collect::<Result<_>>()?,
        };
        Ok(Wishes { excluded, only, filters })
    }

    /// What may come back, search by search.
    pub fn allowed_sets(&self, snapshot: &Snapshot) -> Result<Vec<AllowedSet>> {
        let allowed_set = |filter: &Option<String>| {
            let allowed_set = snapshot.allowed_set(&self.excluded, filter.as_deref())?;
            Ok(match &self.only {
                Some(only) => allowed_set.restricted_to(snapshot, only),
                None => allowed_set,
            })
        };
        self.filters.iter().map(allowed_set).collect()
    }
}

/// The number of a token that a field names.
///
/// # Errors
/// [`Error::InvalidField`] where no token has its text; those of the tokenizer's files.
pub(super) fn named_token(
    vocabulary: &Vocabulary,
    field: &'static str,
    token: &NamedToken,
) -> Result<u32> {
    match token {
        NamedToken::Id(token) => Ok(*token),
        NamedToken::Text(text) => token_of(vocabulary, field, text),
    }
}

/// The one token of a text.
fn token_of(vocabulary: &Vocabulary, field: &'static str, text: &str) -> Result<u32> {
    let invalid = |reason: String| Err(Error::InvalidField { field, reason });
    match vocabulary.token(text) {
        Ok(Some(token)) => Ok(token),
        Ok(None) => invalid(format!(
            "{text:?} is not one token of the model's tokenizer.json; give a text as its \
             vocabulary writes it (a leading space may be \"Ġ\" or \"▁\"), or the token's number"
        )),
        Err(Error::Io { source, .. }) if source.kind() == ErrorKind::NotFound => invalid(format!(
            "{text:?} cannot be looked up, as the model folder has no tokenizer.json; \
             give the token's number, or add the file"
        )),
        Err(error) => Err(error),
    }
}

/// Checks that the tokens of a field are among those of the model.
///
/// # Errors
/// [`Error::InvalidField`].
pub(super) fn check_vocabulary(
    field: &'static str,
    tokens: &[u32],
    vocab_size: usize,
) -> Result<()> {
    match tokens.iter().find(|&&token| token as usize >= vocab_size) {
        None => Ok(()),
        Some(token) => {
            let reason =
                format!("token {token} is outside the model's vocabulary of {vocab_size} tokens");
            Err(Error::InvalidField { field, reason })
        }
    }
}

/// By slot, what may come back. Named tokens are read whatever the catalog has. `wishes`: where the
/// request searches.
pub(super) fn allowed_sets(
    request: &Request,
    snapshot: &Snapshot,
    wishes: Option<&Wishes>,
) -> Result<Vec<AllowedSet>> {
    let mut all = Vec::new();
    if !request.read.is_empty() {
        all.push(snapshot.allowed_set(&[], None)?);
    }
    if let Some(wishes) = wishes {
        all.extend(wishes.allowed_sets(snapshot)?);
    }
    Ok(all)
}

/// The items that must not come back, ascending.
fn excluded(request: &Request, snapshot: &Snapshot) -> Result<Vec<u32>> {
    let mut known = Known::of(&request.exclude, snapshot);
    if request.exclude_history {
        let Input::History(history) = &request.input else {
            let reason = "goes with a \"history\"; name the items in \"exclude\" instead".into();
            return Err(Error::InvalidField { field: "exclude_history", reason });
        };
        known.items.extend(Known::of(history, snapshot).items);
    }
    Ok(known.into_sorted())
}

/// Refuses filters that say nothing. They may be templates that were filled in wrongly, and what they
/// were to keep out must not slip through.
fn check_filters(request: &Request) -> Result<()> {
    let groups = request.groups.iter().map(|group| ("groups", group));
    let mut filters = request.filter.iter().map(|filter| ("filter", filter)).chain(groups);
    match filters.find(|(_, filter)| filter.trim().is_empty()) {
        None => Ok(()),
        Some((field, _)) => {
            let reason = "a filter is empty; leave the field out, or write \"all\" for every item";
            Err(Error::InvalidField { field, reason: reason.into() })
        }
    }
}
