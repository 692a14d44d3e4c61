//! Answers.

use std::collections::BTreeMap;

use engine::{Answer as EngineAnswer, Recommendation};
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyList, PyTuple};
use pythonize::pythonize;

/// An answer: its items, best first, and the counts and versions that belong to it.
#[pyclass(frozen, module = "sidereal")]
pub struct Answer {
    answer: EngineAnswer,
}

impl Answer {
    /// An answer on its way to Python.
    pub fn new(answer: EngineAnswer) -> Answer {
        Answer { answer }
    }

    /// A field as the answer's JSON has it; `None` where it is not there.
    fn field<'py>(&self, py: Python<'py>, name: &str) -> PyResult<Bound<'py, PyAny>> {
        self.to_dict(py)?.call_method1("get", (name,))
    }
}

/// An array of NumPy over the bytes of numbers.
fn array<'py>(
    py: Python<'py>,
    bytes: &[u8],
    dtype: &str,
    shape: &[usize],
) -> PyResult<Bound<'py, PyAny>> {
    let numpy = py.import("numpy")?;
    let array = numpy.call_method1("frombuffer", (PyBytes::new(py, bytes), dtype))?;
    array.call_method1("reshape", (PyTuple::new(py, shape)?,))
}

#[pymethods]
impl Answer {
    /// The items, best first.
    #[getter]
    fn items<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyList>> {
        let items = self.answer.items.iter().map(|found| Py::new(py, Item::new(found)));
        PyList::new(py, items.collect::<PyResult<Vec<_>>>()?)
    }

    /// The items' names, best first.
    #[getter]
    fn names(&self) -> Vec<&str> {
        self.answer.items.iter().map(|found| &*found.item).collect()
    }

    /// The items' scores, an array of float32.
    #[getter]
    fn scores<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        let items = &self.answer.items;
        let bytes: Vec<u8> = items.iter().flat_map(|item| item.score.to_ne_bytes()).collect();
        array(py, &bytes, "float32", &[items.len()])
    }

    /// The items' semantic IDs, an array of int32, one row an item.
    #[getter]
    fn sids<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        let items = &self.answer.items;
        let codes = items.iter().flat_map(|item| item.sid.codes());
        let bytes: Vec<u8> = codes.flat_map(|&code| i32::from(code).to_ne_bytes()).collect();
        let num_levels = items.first().map_or(0, |item| item.sid.codes().len());
        array(py, &bytes, "int32", &[items.len(), num_levels])
    }

    /// The state of the catalog that was searched.
    #[getter]
    fn snapshot(&self) -> u64 {
        self.answer.snapshot.number()
    }

    /// The weights that answered: 1 as the model was opened.
    #[getter]
    fn weights_version(&self) -> u64 {
        self.answer.weights_version
    }

    /// Tokens of the input.
    #[getter]
    fn tokens(&self) -> usize {
        self.answer.tokens
    }

    /// Those of them that the prefix cache had.
    #[getter]
    fn cached_tokens(&self) -> usize {
        self.answer.cached_tokens
    }

    /// Items by filter, where the request has `groups`.
    #[getter]
    fn groups<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        self.field(py, "groups")
    }

    /// Log-probabilities of named tokens, where the request has `read`.
    #[getter]
    fn read<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        self.field(py, "read")
    }

    /// The beams of the search with all that they wrote, where the request has `sequences`.
    #[getter]
    fn sequences<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        self.field(py, "sequences")
    }

    /// The thoughts that come before the search, by branch, where the request has `think`.
    #[getter]
    fn thoughts<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        self.field(py, "thoughts")
    }

    /// Names that the catalog does not have and that were left out.
    #[getter]
    fn unknown_items<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        self.field(py, "unknown_items")
    }

    /// Microseconds of each phase, where the request has `timings`.
    #[getter]
    fn timings<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        self.field(py, "timings")
    }

    /// The whole answer, as its JSON has it.
    fn to_dict<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        Ok(pythonize(py, &self.answer)?)
    }

    fn __len__(&self) -> usize {
        self.answer.items.len()
    }

    fn __iter__<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        Ok(self.items(py)?.try_iter()?.into_any())
    }

    fn __getitem__<'py>(
        &self,
        py: Python<'py>,
        index: Bound<'py, PyAny>,
    ) -> PyResult<Bound<'py, PyAny>> {
        self.items(py)?.as_any().get_item(index)
    }

    fn __repr__(&self) -> String {
        let EngineAnswer { items, snapshot, .. } = &self.answer;
        format!("<sidereal.Answer of {} items, snapshot {}>", items.len(), snapshot.number())
    }
}

/// One item of an answer.
#[pyclass(frozen, get_all, module = "sidereal")]
pub struct Item {
    /// The item's name.
    item: String,
    /// Its semantic ID.
    sid: Vec<u16>,
    /// Natural log of the probability of the semantic ID.
    score: f32,
    /// Its title, where the request has `titles` and the catalog one.
    title: Option<String>,
    /// By token, over the vocabulary and over the legal children; where the request has `log_probs`.
    log_probs: Option<Vec<(f32, f32)>>,
    /// Which of several thoughts gave it its score.
    branch: Option<usize>,
    /// What a network that scores candidates says of it, by task.
    tasks: Option<BTreeMap<String, f32>>,
}

impl Item {
    fn new(found: &Recommendation) -> Item {
        let log_probs = found.log_probs.iter().map(|token| (token.vocabulary, token.children));
        let tasks = found.tasks.iter().map(|task| (task.task.to_string(), task.score));
        Item {
            item: found.item.to_string(),
            sid: found.sid.codes().to_vec(),
            score: found.score,
            title: found.title.as_ref().map(ToString::to_string),
            log_probs: (!found.log_probs.is_empty()).then(|| log_probs.collect()),
            branch: found.branch,
            tasks: (!found.tasks.is_empty()).then(|| tasks.collect()),
        }
    }
}

#[pymethods]
impl Item {
    fn __repr__(&self) -> String {
        format!("<sidereal.Item {:?} {:.3}>", self.item, self.score)
    }
}
