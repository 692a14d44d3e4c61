//! Which items a request names and allows, and which of its names the catalog does not have.
//!
//! Names come from logs, feature stores and other replicas, which know items that the catalog has no
//! longer or not yet. Such names are left out and told, unless the request wants an error for them.

use crate::answer::{UnknownByField, UnknownNames};
use crate::catalog::Snapshot;
use crate::catalog::allowed::AllowedSet;
use crate::catalog::filter::Filter;
use crate::error::{Error, Result};
use crate::request::{Input, Request, UnknownItems};

/// The items of some names.
pub(super) struct Known {
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

/// By slot, what may come back. Named tokens are read whatever the catalog has.
pub(super) fn allowed_sets(
    request: &Request,
    snapshot: &Snapshot,
    has_search: bool,
    unknown_items: &mut UnknownByField,
) -> Result<Vec<AllowedSet>> {
    let mut all = Vec::new();
    if !request.read.is_empty() {
        all.push(snapshot.allowed_set(&[], None)?);
    }
    if has_search {
        all.extend(searches(request, snapshot, unknown_items)?);
    }
    Ok(all)
}

/// What may come back, search by search.
fn searches(
    request: &Request,
    snapshot: &Snapshot,
    unknown_items: &mut UnknownByField,
) -> Result<Vec<AllowedSet>> {
    check_filters(request)?;
    let excluded = excluded(request, snapshot)?;
    let only = request.only.as_ref().map(|names| {
        let mut known = Known::of(names, snapshot);
        unknown_items.only = std::mem::take(&mut known.unknown);
        known.into_sorted()
    });
    let allowed_set = |filter: Option<&str>| {
        let allowed_set = snapshot.allowed_set(&excluded, filter)?;
        Ok(match &only {
            Some(only) => allowed_set.restricted_to(snapshot, only),
            None => allowed_set,
        })
    };
    let filter = request.filter.as_deref();
    if request.groups.is_empty() {
        return Ok(vec![allowed_set(filter)?]);
    }
    let of_group = |group: &String| match filter {
        Some(filter) => allowed_set(Some(&Filter::both(filter, group)?)),
        None => allowed_set(Some(group)),
    };
    request.groups.iter().map(of_group).collect()
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
