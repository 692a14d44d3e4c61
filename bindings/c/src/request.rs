//! Requests.

use std::time::Duration;

use engine::wire::{RequestDefaults, RequestLine};
use engine::{Request, Result};
use serde_json::{Map, Value};

use crate::error::invalid;
use crate::structs::{SizedStruct, read};
use crate::text::{SiderealText, read_slice};

/// A request. It has one input: `history`, `tokens`, or one in `json`.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct SiderealRequest {
    /// sizeof(sidereal_request).
    pub struct_size: usize,
    /// The user's items by name, oldest first.
    pub history: *const SiderealText,
    /// Items of the history.
    pub history_len: usize,
    /// The model's input as it is, instead of a history.
    pub tokens: *const u32,
    /// Tokens.
    pub tokens_len: usize,
    /// Items that must not come back.
    pub exclude: *const SiderealText,
    /// Their number.
    pub exclude_len: usize,
    /// Items to score instead of searching; sidereal_rank needs some.
    pub candidates: *const SiderealText,
    /// Their number.
    pub candidates_len: usize,
    /// Tags combined, as "tag:garden & !tag:adult".
    pub filter: SiderealText,
    /// Finds the context of the user's earlier requests again.
    pub user: SiderealText,
    /// Beam width; 0 for 50.
    pub beams: u32,
    /// Items that come back at most; 0 for 10.
    pub top_k: u32,
    /// Time until the answer must be there, in microseconds; 0 for no deadline.
    pub deadline_us: u64,
    /// Nonzero adds titles to the items.
    pub titles: i32,
    /// Nonzero adds the log-probabilities of the codes, which the answer's JSON shows.
    pub log_probs: i32,
    /// All other fields of a request line, as a JSON object: {"only": ["9"], "seed": 7}.
    pub json: SiderealText,
}

// SAFETY: numbers, pointers and texts, of which all may be zero.
unsafe impl SizedStruct for SiderealRequest {
    const NAME: &'static str = "sidereal_request";
}

/// Reads a request.
///
/// # Safety
/// `request` and all pointers in it are readable.
pub unsafe fn read_request(request: *const SiderealRequest) -> Result<Request> {
    // SAFETY: the caller's promise.
    let given = unsafe { read(request)? };
    // SAFETY: the same.
    let text = |text: SiderealText, field| unsafe { text.read(field) };
    let json = text(given.json, "json")?;
    let mut fields: Map<String, Value> = match json.trim() {
        "" => Map::new(),
        json => engine::json::parse(json).map_err(|reason| invalid("json", reason))?,
    };
    let mut put = |field: &'static str, value: Value| match fields.insert(field.into(), value) {
        None => Ok(()),
        Some(_) => Err(invalid(field, "it is given twice, in the struct and in its json")),
    };
    for (field, data, len) in [
        ("history", given.history, given.history_len),
        ("exclude", given.exclude, given.exclude_len),
        ("candidates", given.candidates, given.candidates_len),
    ] {
        if len > 0 || (field == "history" && !data.is_null()) {
            // SAFETY: the caller's promise.
            put(field, unsafe { texts(data, len, field)? })?;
        }
    }
    // SAFETY: the caller's promise.
    let tokens = unsafe { read_slice(given.tokens, given.tokens_len, "tokens")? };
    if !tokens.is_empty() {
        put("tokens", tokens.into())?;
    }
    for (field, of) in [("filter", given.filter), ("user", given.user)] {
        if !of.data.is_null() {
            put(field, text(of, field)?.into())?;
        }
    }
    for (field, number) in [("beams", given.beams), ("top_k", given.top_k)] {
        if number > 0 {
            put(field, number.into())?;
        }
    }
    for (field, is_set) in [("titles", given.titles), ("log_probs", given.log_probs)] {
        if is_set != 0 {
            put(field, true.into())?;
        }
    }
    if given.deadline_us > 0 && fields.contains_key("deadline_ms") {
        return Err(invalid("deadline_us", "it is given twice, in the struct and in its json"));
    }
    let mut request = RequestLine::from_fields(fields)?.to_request(&RequestDefaults::default())?;
    if given.deadline_us > 0 {
        request.deadline = Some(Duration::from_micros(given.deadline_us));
    }
    request.timings = true;
    Ok(request)
}

/// # Safety
/// The texts and what they lead to are readable.
unsafe fn texts(data: *const SiderealText, len: usize, field: &'static str) -> Result<Value> {
    // SAFETY: the caller's promise.
    let texts = unsafe { read_slice(data, len, field)? };
    // SAFETY: the same.
    let values = texts.iter().map(|text| Ok(Value::from(unsafe { text.read(field)? })));
    values.collect::<Result<Vec<Value>>>().map(Value::Array)
}
