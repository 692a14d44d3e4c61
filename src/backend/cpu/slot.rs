use std::sync::Arc;

use rten_gemm::{GemmInputB, PackedBMatrix};
use rten_tensor::NdTensorView;

use super::scratch::Scratch;
use super::{CpuBackend, SlotSpec};
use crate::backend::Beam;
use crate::catalog::snapshot::Place;
use crate::error::{Error, Result};

/// The memory of one running request.
pub struct Slot {
    pub(super) spec: SlotSpec,
    /// By layer and KV head; forks of a slot have it in common.
    pub(super) contexts: Arc<Vec<Vec<HeadContext>>>,
    /// By layer.
    pub(super) tails: Vec<Tail>,
    pub(super) beams: Beams,
}

/// The context of one layer and KV head, packed for products once and read by all beams.
pub(super) struct HeadContext {
    /// `[head_dim, context_len]`
    keys: PackedBMatrix<f32>,
    /// `[context_len, head_dim]`
    values: PackedBMatrix<f32>,
}

impl HeadContext {
    /// `keys`, `values`: `[context_len, head_dim]`
    pub fn new(
        backend: &CpuBackend,
        keys: NdTensorView<f32, 2>,
        values: NdTensorView<f32, 2>,
    ) -> HeadContext {
        HeadContext { keys: backend.pack(keys.transposed()), values: backend.pack(values) }
    }

    pub fn keys(&self) -> GemmInputB<'_, f32> {
        GemmInputB::Packed(&self.keys)
    }

    pub fn values(&self) -> GemmInputB<'_, f32> {
        GemmInputB::Packed(&self.values)
    }
}

/// Keys and values of the tokens that beams have written, one matrix a position.
///
/// A row is written once, by the beam that chose the token, and stays where it is: the beams that
/// descend from it find it through their ancestors.
#[derive(Clone, Default)]
pub(super) struct Tail {
    /// By position: `[beams then, kv_dim]` keys and the same of values.
    pub positions: Vec<(Scratch, Scratch)>,
}

/// The beams of a search, best first once a step was taken.
#[derive(Clone)]
pub(super) struct Beams {
    pub scores: Vec<f32>,
    /// By beam: its rank among them by its tokens. Equal scores go by it.
    pub ranks: Vec<u32>,
    /// By beam: its place in the catalog, in a search that is constrained to it.
    pub places: Vec<Place>,
    /// Whether the places are whole semantic IDs.
    pub are_leaves: bool,
    /// `[beams][steps taken]`, flat.
    pub tokens: Vec<u32>,
    pub num_steps: usize,
    /// `[beams][positions of the tail before the newest]`, flat: the row of each ancestor.
    pub ancestors: Vec<u32>,
    pub num_ancestors: usize,
    pub start_token: u32,
    pub failed_step: Option<usize>,
}

impl Beams {
    /// The one beam that a search starts with.
    pub fn start(start_token: u32) -> Beams {
        Beams {
            scores: vec![0.0],
            ranks: vec![0],
            places: Vec::new(),
            are_leaves: false,
            tokens: Vec::new(),
            num_steps: 0,
            ancestors: Vec::new(),
            num_ancestors: 0,
            start_token,
            failed_step: None,
        }
    }

    pub fn len(&self) -> usize {
        self.scores.len()
    }

    pub fn newest_tokens(&self) -> impl Iterator<Item = u32> {
        let newest = |beam: usize| match self.num_steps {
            0 => self.start_token,
            steps => self.tokens[(beam + 1) * steps - 1],
        };
        (0..self.len()).map(newest)
    }

    pub fn ancestors_of(&self, beam: usize) -> &[u32] {
        &self.ancestors[beam * self.num_ancestors..(beam + 1) * self.num_ancestors]
    }

    pub fn read(&self) -> Result<Vec<Beam>> {
        if let Some(step) = self.failed_step {
            return Err(Error::NonFiniteScores { step });
        }
        let beam = |at: usize| Beam {
            tokens: self.tokens[at * self.num_steps..(at + 1) * self.num_steps].to_vec(),
            place: self.are_leaves.then(|| self.places[at]),
            score: self.scores[at],
        };
        Ok((0..self.len()).map(beam).collect())
    }
}

impl Slot {
    pub(super) fn new(spec: &SlotSpec) -> Slot {
        Slot {
            spec: *spec,
            contexts: Arc::new((0..spec.num_layers).map(|_| Vec::new()).collect()),
            tails: (0..spec.num_layers).map(|_| Tail::default()).collect(),
            beams: Beams::start(spec.start_token),
        }
    }
}
