//! Memory for activations, kept by each thread for the next that asks: what is large comes from the
//! system page by page, and would again and again.

use std::cell::RefCell;
use std::ops::{Deref, DerefMut};

thread_local! {
    static SPARE: RefCell<Vec<Vec<f32>>> = const { RefCell::new(Vec::new()) };
}

/// Floats of arbitrary value; the memory goes back to the thread that drops it.
pub(super) struct Scratch {
    values: Vec<f32>,
    len: usize,
}

impl Scratch {
    pub fn new(len: usize) -> Scratch {
        let mut values = SPARE.with_borrow_mut(Vec::pop).unwrap_or_default();
        if values.len() < len {
            values.resize(len, 0.0);
        }
        Scratch { values, len }
    }

    /// Takes another length; the values are then arbitrary.
    pub fn resize(&mut self, len: usize) {
        if self.values.len() < len {
            self.values.resize(len, 0.0);
        }
        self.len = len;
    }
}

impl Default for Scratch {
    fn default() -> Scratch {
        Scratch::new(0)
    }
}

impl From<Vec<f32>> for Scratch {
    fn from(values: Vec<f32>) -> Scratch {
        Scratch { len: values.len(), values }
    }
}

impl Deref for Scratch {
    type Target = [f32];

    fn deref(&self) -> &[f32] {
        &self.values[..self.len]
    }
}

impl DerefMut for Scratch {
    fn deref_mut(&mut self) -> &mut [f32] {
        &mut self.values[..self.len]
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let values = std::mem::take(&mut self.values);
        // At the end of a thread its spare memory may be gone already; then this goes as well.
        let _ = SPARE.try_with(|spare| spare.borrow_mut().push(values));
    }
}
