//! A search as the host knows it.

use std::sync::{Arc, OnceLock};

use super::catalog::SearchArrays;
use super::driver::Driver;
use super::memory::Arrays;
use crate::backend::SlotSpec;
use crate::pages::TAIL_PAGE_LEN;

/// One search: what the host knows of it. Its beams are on the device; here is how many there may
/// be.
pub struct Slot<D: Driver> {
    pub(super) spec: SlotSpec,
    pub(super) arrays: Arc<Arrays<D>>,
    pub(super) num_steps: usize,
    /// By position: rows for beams.
    pub(super) room: Vec<usize>,
    /// By position: its first page among the slot's tail pages.
    pub(super) position_page: Vec<usize>,
    /// The first position that has keys and values.
    pub(super) tail_from: Option<usize>,
    /// What the search may be answered with, from its first step on.
    pub(super) search: OnceLock<SearchArrays<D>>,
    pub(super) keeps_log_probs: bool,
    /// Whether cursors are whole semantic IDs.
    pub(super) reached_leaves: bool,
}

impl<D: Driver> Slot<D> {
    pub(super) fn new(spec: SlotSpec, arrays: Arc<Arrays<D>>) -> Slot<D> {
        Slot {
            spec,
            arrays,
            num_steps: 0,
            room: vec![1],
            position_page: vec![0],
            tail_from: None,
            search: OnceLock::new(),
            keeps_log_probs: false,
            reached_leaves: false,
        }
    }

    /// Rows that the beams take at the present step.
    pub(super) fn num_rows(&self) -> usize {
        self.room[self.num_steps]
    }

    /// Makes room for the beams of the next position.
    pub(super) fn begin_position(&mut self, room: usize) {
        if self.room.len() == self.num_steps + 1 {
            let pages = self.num_rows().div_ceil(TAIL_PAGE_LEN);
            self.position_page.push(self.position_page[self.num_steps] + pages);
            self.room.push(room);
        }
    }
}
