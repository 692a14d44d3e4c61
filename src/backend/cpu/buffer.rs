//! Activations.

use std::ops::Range;

use super::scratch::Scratch;

/// Values that one task of an elementwise operation works on.
pub(super) const VALUES_PER_TASK: usize = 1 << 14;

/// Activations `[rows, columns]`, dense.
pub struct Buffer {
    pub(super) values: Scratch,
    pub(super) columns: usize,
}

impl Default for Buffer {
    fn default() -> Buffer {
        Buffer { values: Scratch::new(0), columns: 0 }
    }
}

impl Buffer {
    /// A buffer of these values.
    ///
    /// # Panics
    /// Where `values` are not whole rows.
    pub fn new(values: Vec<f32>, columns: usize) -> Buffer {
        assert!(values.len().is_multiple_of(columns), "rows must be whole");
        Buffer { values: Scratch::from(values), columns }
    }

    /// All values, row after row.
    pub fn values(&self) -> &[f32] {
        &self.values
    }

    /// The number of rows.
    pub fn num_rows(&self) -> usize {
        self.values.len().checked_div(self.columns).unwrap_or(0)
    }

    /// The number of columns.
    pub fn num_columns(&self) -> usize {
        self.columns
    }

    pub(super) fn row(&self, row: usize) -> &[f32] {
        &self.values[row * self.columns..(row + 1) * self.columns]
    }

    /// Takes a shape; the values are then arbitrary.
    pub(super) fn reshape(&mut self, rows: usize, columns: usize) {
        self.values.resize(rows * columns);
        self.columns = columns;
    }

    /// Makes `out` of some of the rows.
    pub(super) fn copy_rows(&self, rows: impl Iterator<Item = Range<usize>>, out: &mut Buffer) {
        let rows: Vec<Range<usize>> = rows.collect();
        out.reshape(rows.iter().map(Range::len).sum(), self.columns);
        let mut rest = &mut out.values[..];
        for rows in rows {
            let (to, after) = rest.split_at_mut(rows.len() * self.columns);
            to.copy_from_slice(&self.values[rows.start * self.columns..rows.end * self.columns]);
            rest = after;
        }
    }
}
