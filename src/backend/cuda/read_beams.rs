//! Launches `read_beams.cu`, and reads what it gathered: the one copy back to the host.

use super::backend::CudaBackend;
use super::device::reason_of;
use super::driver::Driver;
use super::memory::Beams;
use super::metadata::{self, BatchParams};
use super::shared::shared_struct;
use super::slot::Slot;
use super::tiling::MAX_POSITIONS;
use crate::backend::{Beam, LogProb, ReadBeams};
use crate::catalog::cursor::{Cursor, Node};
use crate::error::{Error, Result};

shared_struct! {
    /// Beams on their way to the host.
    struct Params = "read_beams::Params" {
        out: u64 = "uint32_t*",
        /// By slot.
        parts: u64 = "const Part*",
        batch: BatchParams,
        beams: Beams,
    }
}

shared_struct! {
    /// Where the beams of a slot go.
    struct Part = "read_beams::Part" {
        /// Of `out`.
        first_word: u32,
        keeps_log_probs: u32,
    }
}

impl<D: Driver> ReadBeams for CudaBackend<D> {
    fn read_beams(&self, slots: &[&Slot<D>]) -> Vec<Result<Vec<Beam>>> {
        match self.read_words(slots) {
            Ok((words, parts)) => slots
                .iter()
                .zip(parts)
                .map(|(slot, part)| match slot.search.get().and_then(|it| it.failure.as_ref()) {
                    Some(failure) => Err(failure.clone()),
                    None => beams_of(slot, &words[part.first_word as usize..]),
                })
                .collect(),
            Err(error) => {
                let reason = reason_of(error);
                slots.iter().map(|_| Err(self.device.error(&reason))).collect()
            }
        }
    }
}

impl<D: Driver> CudaBackend<D> {
    /// What the kernel put together, and where each slot's part is.
    fn read_words(&self, slots: &[&Slot<D>]) -> Result<(Vec<u32>, Vec<Part>)> {
        self.device.check()?;
        let Some(first) = slots.first() else { return Ok((Vec::new(), Vec::new())) };
        let (heads, beams) = (first.arrays.spec.kv.heads, first.arrays.beams());
        let mut num_words = 0;
        let mut parts: Vec<Part> = Vec::new();
        for slot in slots {
            let keeps_log_probs = u32::from(slot.keeps_log_probs);
            parts.push(Part { first_word: num_words as u32, keeps_log_probs });
            num_words += 2 + slot.num_rows() * words_of_beam(slot.num_steps, slot.keeps_log_probs);
        }
        let reader = &mut *self.reader.lock().expect("no holder panics");
        let tiling = self.tiling(heads);
        let metadata = metadata::write(&mut reader.metadata, &[], slots, tiling, None);
        reader.parts.write_often(&parts);
        reader.words.reserve(num_words * size_of::<u32>());
        let params = Params {
            out: reader.words.at(0),
            parts: reader.parts.at(0),
            batch: metadata.batch,
            beams,
        };
        self.device.launch("read_beams_u32", [slots.len(), 1, 1], 128, 0, &params);
        let mut words = vec![0; num_words];
        reader.words.read(&mut words)?;
        Ok((words, parts))
    }
}

/// Of a beam that has taken all steps and keeps their log-probabilities, with its share of what is
/// said of the search.
pub(super) const MOST_BYTES_OF_BEAM: usize = 4 * (2 + words_of_beam(MAX_POSITIONS - 1, true));

const fn words_of_beam(num_steps: usize, keeps_log_probs: bool) -> usize {
    3 + num_steps + if keeps_log_probs { 2 * num_steps } else { 0 }
}

fn beams_of<D: Driver>(slot: &Slot<D>, words: &[u32]) -> Result<Vec<Beam>> {
    let (count, failure) = (words[0] as usize, words[1] as usize);
    if failure > 0 {
        return Err(Error::NonFiniteScores { step: failure - 1 });
    }
    let steps = slot.num_steps;
    if steps == 0 {
        return Ok(vec![Beam {
            tokens: Vec::new(),
            cursor: None,
            phrase: None,
            num_skipped: 0,
            score: 0.0,
            log_probs: Vec::new(),
        }]);
    }
    let beam = |words: &[u32]| Beam {
        score: f32::from_bits(words[0]),
        cursor: slot
            .reached_leaves
            .then(|| Cursor { base: Node::new(words[1]), delta: Node::new(words[2]) }),
        phrase: None,
        num_skipped: 0,
        tokens: words[3..3 + steps].to_vec(),
        log_probs: match slot.keeps_log_probs {
            false => Vec::new(),
            true => words[3 + steps..]
                .as_chunks::<2>()
                .0
                .iter()
                .map(|&[vocabulary, children]| LogProb {
                    vocabulary: f32::from_bits(vocabulary),
                    children: f32::from_bits(children),
                })
                .collect(),
        },
    };
    let words_of_beam = words_of_beam(steps, slot.keeps_log_probs);
    Ok(words[2..].chunks_exact(words_of_beam).take(count).map(beam).collect())
}
