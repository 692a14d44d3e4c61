//! Requests, from dictionaries.

use engine::wire::{RequestDefaults, RequestLine};
use engine::{Error, Request};
use pyo3::prelude::*;
use pyo3::types::PyDict;
use pythonize::depythonize;
use serde_json::{Map, Value};

use crate::error::{Raise, raised};

/// A Python value as JSON has it.
pub fn to_json(value: &Bound<'_, PyAny>) -> PyResult<Value> {
    depythonize(value).map_err(|error| {
        let reason = format!("{error}; numbers, texts, lists and dictionaries of them are read");
        raised(value.py(), &Error::MalformedRequest { reason })
    })
}

/// The request that a dictionary of the fields of a request line says.
pub fn read(fields: &Bound<'_, PyDict>) -> PyResult<Request> {
    let py = fields.py();
    let json: Map<String, Value> = match to_json(fields)? {
        Value::Object(fields) => fields,
        other => unreachable!("a dictionary is an object, not {other}"),
    };
    let line = RequestLine::from_fields(json).raise(py)?;
    line.to_request(&RequestDefaults::default()).raise(py)
}
