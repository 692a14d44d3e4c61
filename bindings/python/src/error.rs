//! Errors as exceptions: `sidereal.errors` has their classes.

use engine::Error;
use engine::wire::ErrorBody;
use pyo3::prelude::*;
use pythonize::pythonize;

/// The exception of an error, as an object.
pub fn exception<'py>(py: Python<'py>, error: &Error) -> PyResult<Bound<'py, PyAny>> {
    let body = pythonize(py, &ErrorBody::with_kind(error))?;
    py.import("sidereal.errors")?.call_method1("from_body", (body,))
}

/// The exception of an error, to be raised.
pub fn raised(py: Python<'_>, error: &Error) -> PyErr {
    match exception(py, error) {
        Ok(exception) => PyErr::from_value(exception),
        Err(other) => other,
    }
}

/// What raises an error of the engine.
pub trait Raise<T> {
    /// The result, its error as an exception.
    fn raise(self, py: Python<'_>) -> PyResult<T>;
}

impl<T> Raise<T> for engine::Result<T> {
    fn raise(self, py: Python<'_>) -> PyResult<T> {
        self.map_err(|error| raised(py, &error))
    }
}

/// The error of an argument.
pub fn invalid(field: &'static str, reason: impl Into<String>) -> Error {
    Error::InvalidField { field, reason: reason.into() }
}
