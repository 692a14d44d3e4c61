//! The native half of the Python package `sidereal`: `sidereal/__init__.py` is the other.
//!
//! Requests, answers and changes have the fields that they have as JSON lines. Whatever waits lets
//! other Python threads run and looks for signals; the engine's own thread never waits for Python.

mod answer;
mod catalog;
mod delivery;
mod error;
mod recommender;
mod request;
mod weights;

use pyo3::prelude::*;

#[pymodule]
mod _sidereal {
    #[pymodule_export]
    use crate::answer::{Answer, Item};
    #[pymodule_export]
    use crate::recommender::Recommender;

    use super::*;

    #[pymodule_init]
    fn init(module: &Bound<'_, PyModule>) -> PyResult<()> {
        module.add("__version__", env!("CARGO_PKG_VERSION"))
    }
}
