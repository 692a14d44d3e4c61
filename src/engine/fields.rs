//! Values and combinations of fields that no request may have.

use crate::catalog::Snapshot;
use crate::error::{Error, Result};
use crate::request::{Request, per_sid_below_one};
use crate::search::Constraint;

/// Refuses a catalog that is behind the state that the request asks for: it may not know the
/// request's items yet, so this comes before all that looks them up.
pub(crate) fn check_snapshot(request: &Request, snapshot: &Snapshot) -> Result<()> {
    let snapshot = snapshot.number();
    match request.min_snapshot {
        Some(min_snapshot) if snapshot < min_snapshot => {
            Err(Error::CatalogBehind { snapshot, min_snapshot })
        }
        _ => Ok(()),
    }
}

/// Refuses values that no request may have, and fields that the request's program has no use for.
/// `device`: why it draws nothing without the trie, where it does not.
pub(super) fn check_fields(request: &Request, has_search: bool, device: &Result<()>) -> Result<()> {
    let Request { top_k, temperature, constraint, .. } = *request;
    if top_k == 0 {
        return Err(Error::TopK { top_k: 0 });
    }
    if request.per_sid == Some(0) {
        return Err(per_sid_below_one(0));
    }
    if !(temperature.is_finite() && temperature > 0.0 && (1.0 / temperature).is_finite()) {
        let reason = format!("{temperature} is not a number above zero");
        return Err(Error::InvalidField { field: "temperature", reason });
    }
    if constraint != Constraint::Trie && (request.seed.is_some() || request.log_probs) {
        device.clone()?;
    }
    let of_lists = [
        ("groups", !request.groups.is_empty()),
        ("think", request.think.as_ref().is_some_and(|think| think.branches > 1)),
    ];
    if let Some((field, _)) =
        of_lists.into_iter().find(|(_, is_given)| *is_given && request.sequences)
    {
        let what = if field == "think" { "\"think\" of several branches" } else { "\"groups\"" };
        let reason = format!("goes without {what}; leave one of them out");
        return Err(Error::InvalidField { field: "sequences", reason });
    }
    let of_searches = [
        ("filter", request.filter.is_some()),
        ("exclude", !request.exclude.is_empty()),
        ("exclude_history", request.exclude_history),
        ("only", request.only.is_some()),
        ("seed", request.seed.is_some()),
        ("log_probs", request.log_probs),
        ("sequences", request.sequences),
    ];
    match of_searches.into_iter().find(|(_, is_given)| *is_given && !has_search) {
        Some((field, _)) => {
            let reason = "goes with a search, which \"read\" replaces; leave it out, or ask for \
                          items as well by \"groups\" or \"candidates\""
                .into();
            Err(Error::InvalidField { field, reason })
        }
        None => Ok(()),
    }
}
