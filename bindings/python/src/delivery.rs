//! Answers on their way to callbacks in Python.
//!
//! A callback waits for Python's lock, and the engine's thread must not: all requests would wait
//! with it. So answers go through a thread of their own.

use std::sync::OnceLock;
use std::sync::mpsc::{self, Sender};

use engine::Result;
use pyo3::prelude::*;

use crate::answer::Answer;
use crate::error::exception;

struct Delivery {
    callback: Py<PyAny>,
    answer: Result<engine::Answer>,
}

/// Hands an answer, or the exception in its place, to a callback, on another thread and without
/// waiting for it.
pub fn deliver(callback: Py<PyAny>, answer: Result<engine::Answer>) {
    static DELIVERIES: OnceLock<Sender<Delivery>> = OnceLock::new();
    let sender = DELIVERIES.get_or_init(|| {
        let (sender, deliveries) = mpsc::channel::<Delivery>();
        let run = move || deliveries.into_iter().for_each(Delivery::run);
        // Without a thread the receiver is dropped, and the callback with what is sent.
        let _ = std::thread::Builder::new().name("sidereal-python".into()).spawn(run);
        sender
    });
    let _ = sender.send(Delivery { callback, answer });
}

impl Delivery {
    fn run(self) {
        // Where the interpreter is ending, nobody waits for the answer.
        let _ = Python::try_attach(|py| {
            let Delivery { callback, answer } = self;
            let argument = match answer {
                Ok(answer) => Py::new(py, Answer::new(answer)).map(Py::into_any),
                Err(error) => exception(py, &error).map(Bound::unbind),
            };
            let called = argument.and_then(|argument| callback.call1(py, (argument,)));
            if let Err(error) = called {
                error.write_unraisable(py, Some(callback.bind(py)));
            }
        });
    }
}
