//! The keys and values of a network, and what is leased of them: memory and slots.

use super::Heads;
use crate::error::{Error, Result};

/// The keys and values of a network, as memory holds them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct KvLayout {
    /// Sets of keys and values that a context holds: one for each layer that attends to it.
    pub context_sets: usize,
    /// Layers whose beams keep keys and values in tails.
    pub tail_layers: usize,
    /// The heads of keys and values, and the queries that share them.
    pub heads: Heads,
    /// Whether the keys are the values, kept once. No kernel serves that yet:
    /// [`DeviceOps::memory`](super::DeviceOps::memory) refuses it.
    pub values_are_keys: bool,
}

impl KvLayout {
    /// A context set and a tail in each of `num_layers` layers.
    pub fn new(num_layers: usize, heads: Heads) -> KvLayout {
        KvLayout {
            context_sets: num_layers,
            tail_layers: num_layers,
            heads,
            values_are_keys: false,
        }
    }

    /// Numbers that a token of a context takes.
    pub fn numbers_per_token(&self) -> usize {
        self.context_sets * (self.heads.keys_dim() + self.heads.values_dim())
    }

    /// Numbers that a row of a tail takes.
    pub fn numbers_per_tail_row(&self) -> usize {
        self.tail_layers * (self.heads.keys_dim() + self.heads.values_dim())
    }

    /// # Errors
    /// [`Error::Unsupported`] where no kernel serves such keys and values.
    pub(super) fn check(&self) -> Result<()> {
        let Heads { key_dim, value_dim, .. } = self.heads;
        if key_dim != value_dim {
            return Err(Error::Unsupported {
                what: format!("keys of {key_dim} columns with values of {value_dim}"),
                way_out: "keys and values of one width are".into(),
            });
        }
        if self.values_are_keys {
            return Err(Error::Unsupported {
                what: "attention whose values are its keys".into(),
                way_out: "keys and values apart are".into(),
            });
        }
        Ok(())
    }
}

/// The memory for all contexts and tails and for steps, taken once.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MemorySpec {
    /// What a token of a context and a row of a tail hold.
    pub kv: KvLayout,
    /// Pages of contexts, [`PAGE_LEN`](crate::pages::PAGE_LEN) tokens each.
    pub context_pages: usize,
    /// Pages of tails, [`TAIL_PAGE_LEN`](crate::pages::TAIL_PAGE_LEN) rows each.
    pub tail_pages: usize,
    /// Beams in a step, for which a device takes memory at once; a single search may have more.
    pub rows_per_step: usize,
    /// Tokens of prompts in a step, for which a device takes memory at once; a prompt that is read
    /// as a whole may have more.
    pub tokens_per_step: usize,
}

/// The lease of one search: what it needs is fixed when its request is admitted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SlotSpec {
    /// The pages of the context, in order; searches may have them in common.
    pub context_pages: Vec<u32>,
    /// Tokens of the context.
    pub context_len: usize,
    /// The pages for tails: at each position as many as its beams fill, one position after the
    /// other.
    pub tail_pages: Vec<u32>,
    /// The steps that the search takes; [`DeviceOps::max_steps`](super::DeviceOps::max_steps) is the limit.
    pub num_steps: usize,
    /// The token of the one beam that a search starts with, where the decoder reads one.
    pub start_token: u32,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn layouts_that_no_kernel_serves_are_refused() {
        let layout = KvLayout::new(2, Heads::new(4, 2, 8));
        assert!(layout.check().is_ok());
        let wide = KvLayout { heads: Heads { value_dim: 16, ..layout.heads }, ..layout };
        assert!(wide.check().expect_err("too wide").to_string().contains("values of 16"));
        let shared = KvLayout { values_are_keys: true, ..layout };
        assert!(matches!(shared.check(), Err(Error::Unsupported { .. })));
    }
}
