//! Changes as the log has them: postcard's binary form, apart from their JSON, because logs stay
//! readable when the JSON changes.

use std::borrow::Cow;

use serde::{Deserialize, Serialize};

use crate::catalog::sid::Sid;
use crate::catalog::{Change, Item, ItemWeight, Watermark};

/// Fields and variants by position: new ones go to the end, and none may move. `PutWeighted` is a put
/// of an item with a weight of its own.
#[derive(Serialize, Deserialize)]
enum LoggedChange<'a> {
    Put(LoggedItem<'a>),
    Delete { item: Cow<'a, str> },
    Availability { item: Cow<'a, str>, available: bool },
    Tag { item: Cow<'a, str>, add: Cow<'a, [String]>, remove: Cow<'a, [String]> },
    PutWeighted { item: LoggedItem<'a>, weight: ItemWeight },
    Weight { item: Cow<'a, str>, weight: ItemWeight },
}

#[derive(Serialize, Deserialize)]
struct LoggedItem<'a> {
    name: Cow<'a, str>,
    sid: Sid,
    title: Cow<'a, str>,
    tags: Cow<'a, [String]>,
    available: bool,
}

impl<'a> From<&'a Item> for LoggedItem<'a> {
    fn from(item: &'a Item) -> LoggedItem<'a> {
        LoggedItem {
            name: (&item.name).into(),
            sid: item.sid,
            title: (&item.title).into(),
            tags: (&item.tags).into(),
            available: item.available,
        }
    }
}

impl LoggedItem<'_> {
    fn with_weight(self, weight: ItemWeight) -> Item {
        Item {
            name: self.name.into(),
            sid: self.sid,
            title: self.title.into(),
            tags: self.tags.into(),
            available: self.available,
            weight,
        }
    }
}

impl<'a> From<&'a Change> for LoggedChange<'a> {
    fn from(change: &'a Change) -> LoggedChange<'a> {
        match change {
            Change::Put(item) if item.weight.is_default() => LoggedChange::Put(item.into()),
            Change::Put(item) => {
                LoggedChange::PutWeighted { item: item.into(), weight: item.weight }
            }
            Change::Delete { item } => LoggedChange::Delete { item: item.into() },
            &Change::Availability { ref item, available } => {
                LoggedChange::Availability { item: item.into(), available }
            }
            Change::Tag { item, add, remove } => {
                LoggedChange::Tag { item: item.into(), add: add.into(), remove: remove.into() }
            }
            &Change::Weight { ref item, weight } => {
                LoggedChange::Weight { item: item.into(), weight }
            }
        }
    }
}

impl From<LoggedChange<'_>> for Change {
    fn from(change: LoggedChange<'_>) -> Change {
        match change {
            LoggedChange::Put(item) => Change::Put(item.with_weight(ItemWeight::default())),
            LoggedChange::PutWeighted { item, weight } => Change::Put(item.with_weight(weight)),
            LoggedChange::Delete { item } => Change::Delete { item: item.into() },
            LoggedChange::Availability { item, available } => {
                Change::Availability { item: item.into(), available }
            }
            LoggedChange::Tag { item, add, remove } => {
                Change::Tag { item: item.into(), add: add.into(), remove: remove.into() }
            }
            LoggedChange::Weight { item, weight } => Change::Weight { item: item.into(), weight },
        }
    }
}

/// Appends a batch of changes to `bytes`, and its watermark where it has one.
pub(super) fn to_payload(
    changes: &[Change],
    watermark: Option<&Watermark>,
    bytes: Vec<u8>,
) -> Vec<u8> {
    const ROOM: &str = "a vector takes all bytes";
    let logged: Vec<LoggedChange<'_>> = changes.iter().map(LoggedChange::from).collect();
    let bytes = postcard::to_extend(&logged, bytes).expect(ROOM);
    match watermark {
        Some(watermark) => postcard::to_extend(watermark, bytes).expect(ROOM),
        None => bytes,
    }
}

/// Reads a batch of changes and its watermark. Logs of version 1 have none.
///
/// # Errors
/// Postcard's, where the bytes are no batch.
pub(super) fn from_payload(bytes: &[u8]) -> postcard::Result<(Vec<Change>, Option<Watermark>)> {
    let (logged, rest) = postcard::take_from_bytes::<Vec<LoggedChange<'_>>>(bytes)?;
    let watermark = match rest {
        [] => None,
        rest => Some(postcard::from_bytes(rest)?),
    };
    Ok((logged.into_iter().map(Change::from).collect(), watermark))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// As version 0.1 wrote it before changes had a form of their own in the log.
    const OLD_PAYLOAD: &[u8] = b"\x04\x00\x0217\x02\x03\xfa\x01\x06A lamp\x02\x06garden\x03new\x01\
        \x02\x01a\x00\x03\x01b\x01\x01y\x01\x01x\x01\x0217";

    #[test]
    fn an_old_log_reads_and_new_ones_are_written_alike() {
        let (changes, watermark) = from_payload(OLD_PAYLOAD).expect("an old log");
        assert_eq!(watermark, None);
        let mut lamp = Item::new("17", Sid::new(&[3, 250]).expect("two codes"));
        lamp.title = "A lamp".into();
        lamp.tags = vec!["garden".into(), "new".into()];
        let expected = [
            Change::Put(lamp),
            Change::Availability { item: "a".into(), available: false },
            Change::Tag { item: "b".into(), add: vec!["y".into()], remove: vec!["x".into()] },
            Change::Delete { item: "17".into() },
        ];
        assert_eq!(changes, expected);
        assert_eq!(to_payload(&changes, None, Vec::new()), OLD_PAYLOAD);
        let watermark = Watermark::new("items", 3, 300);
        let payload = to_payload(&changes, Some(&watermark), Vec::new());
        assert!(payload.starts_with(OLD_PAYLOAD));
        assert_eq!(from_payload(&payload), Ok((changes, Some(watermark))));
    }

    #[test]
    fn weights_are_logged_and_a_weight_that_is_not_finite_is_no_batch() {
        let weight = ItemWeight::new(2.5).expect("finite");
        let mut lamp = Item::new("17", Sid::new(&[3, 250]).expect("two codes"));
        lamp.weight = weight;
        let changes = [Change::Put(lamp), Change::Weight { item: "9".into(), weight }];
        let mut payload = to_payload(&changes, None, Vec::new());
        assert_eq!(from_payload(&payload).expect("just written").0, changes);
        let end = payload.len();
        payload[end - 4..].copy_from_slice(&f32::NAN.to_le_bytes());
        assert!(from_payload(&payload).is_err());
    }
}
