//! An array that lives in memory or in a file seen as memory.

use std::ops::{Deref, Range};
use std::sync::Arc;

use bytemuck::Pod;

use crate::mapping::Mapping;

/// A read-only array of plain values: owned, or part of a file.
pub(crate) enum Column<T: Pod> {
    Owned(Vec<T>),
    Mapped { mapping: Arc<Mapping>, bytes: Range<usize> },
}

impl<T: Pod> Column<T> {
    /// The bytes `bytes` of `mapping`, or `None` where they are not whole, aligned values inside it.
    pub fn mapped(mapping: &Arc<Mapping>, bytes: Range<usize>) -> Option<Column<T>> {
        bytemuck::try_cast_slice::<u8, T>(mapping.bytes().get(bytes.clone())?).ok()?;
        Some(Column::Mapped { mapping: Arc::clone(mapping), bytes })
    }
}

impl<T: Pod> Deref for Column<T> {
    type Target = [T];

    fn deref(&self) -> &[T] {
        match self {
            Column::Owned(values) => values,
            Column::Mapped { mapping, bytes } => {
                bytemuck::cast_slice(&mapping.bytes()[bytes.clone()])
            }
        }
    }
}

impl<T: Pod> From<Vec<T>> for Column<T> {
    fn from(values: Vec<T>) -> Column<T> {
        Column::Owned(values)
    }
}
