//! What is known of a request beside its items.

use serde_json::{Map, Value};

use crate::error::{Error, Result};

/// What is known of a request beside its items: for networks that read times, ratings, actions and
/// whatever else they were trained with. What a network does not read has no effect.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
#[non_exhaustive]
pub struct Features {
    /// The time of the request, in seconds, counted as the times of its history are.
    pub time: Option<i64>,
    /// Of the user and the request: `{"user_id": 7, "country": "DE"}`.
    pub context: Map<String, Value>,
    /// Of the entries of the history: `{"time": 1700000000, "rating": 4}`; empty, or one for each.
    pub history: Vec<Map<String, Value>>,
    /// Of the candidates; empty, or one for each.
    pub candidates: Vec<Map<String, Value>>,
}

impl Features {
    /// Sets [`time`](Features::time).
    #[must_use]
    pub fn with_time(mut self, seconds: i64) -> Features {
        self.time = Some(seconds);
        self
    }

    /// Sets [`context`](Features::context).
    #[must_use]
    pub fn with_context(mut self, context: Map<String, Value>) -> Features {
        self.context = context;
        self
    }

    /// Sets [`history`](Features::history).
    #[must_use]
    pub fn with_history(mut self, history: Vec<Map<String, Value>>) -> Features {
        self.history = history;
        self
    }

    /// Sets [`candidates`](Features::candidates).
    #[must_use]
    pub fn with_candidates(mut self, candidates: Vec<Map<String, Value>>) -> Features {
        self.candidates = candidates;
        self
    }
}

/// Checks that features belong to as many entries as there are.
///
/// # Errors
/// [`Error::InvalidField`].
pub(crate) fn check_len(
    field: &'static str,
    num_features: usize,
    num_entries: usize,
) -> Result<()> {
    match num_features == 0 || num_features == num_entries {
        true => Ok(()),
        false => Err(Error::InvalidField {
            field,
            reason: format!("has {num_entries} entries and features of {num_features}"),
        }),
    }
}

/// A feature that is a whole number, in any notation that means one.
///
/// # Errors
/// [`Error::InvalidField`] where it is there and is none.
pub(crate) fn whole(
    features: &Map<String, Value>,
    name: &str,
    field: &'static str,
) -> Result<Option<i64>> {
    let Some(value) = features.get(name).filter(|value| !value.is_null()) else {
        return Ok(None);
    };
    let of_float = |value: f64| {
        (value.fract() == 0.0 && value.abs() < (1u64 << 53) as f64).then_some(value as i64)
    };
    let number = match value {
        Value::Number(number) => number.as_i64().or_else(|| of_float(number.as_f64()?)),
        Value::String(text) => text.trim().parse().ok(),
        Value::Bool(value) => Some(i64::from(*value)),
        _ => None,
    };
    match number {
        Some(number) => Ok(Some(number)),
        None => Err(Error::InvalidField {
            field,
            reason: format!("{name:?} is {value}, which is no whole number of 64 bits"),
        }),
    }
}
