//! A search on the CPU: its lease, its tails and its beams.

use crate::backend::ended_phrases::{EndedPhrase, EndedPhrases};
use crate::backend::{Beam, LogProb, SlotSpec};
use crate::catalog::cursor::Cursor;
use crate::catalog::phrases::PhraseNode;
use crate::error::{Error, Result};
use crate::pages::TAIL_PAGE_LEN;

/// One search.
pub struct Slot {
    pub(super) spec: SlotSpec,
    /// By position of the tails: where its rows begin. A row is written
    /// once, by the beam that chose the token, and stays where it is: the beams that descend from
    /// it find it through their ancestors.
    pub(super) positions: Vec<TailPosition>,
    /// Tail pages that have been begun.
    num_tail_pages: usize,
    pub(super) beams: Beams,
}

/// Where the rows of one position of the tails begin.
#[derive(Debug, Clone, Copy)]
pub(super) struct TailPosition {
    /// Which of the slot's tail pages.
    pub page: usize,
    /// Above zero for positions of one beam alone, which share pages.
    pub row: usize,
    num_rows: usize,
}

/// The beams of a search, best first once a step was taken.
#[derive(Clone)]
pub(super) struct Beams {
    pub scores: Vec<f32>,
    /// By beam: its rank among them by its tokens. Equal scores go by it.
    pub ranks: Vec<u32>,
    /// By beam: its cursor in the catalog, in a search that is constrained to it.
    pub cursors: Vec<Cursor>,
    /// Whether the cursors are whole semantic IDs.
    pub are_leaves: bool,
    /// `[beams][steps taken]`, flat.
    pub tokens: Vec<u32>,
    pub num_steps: usize,
    /// `[beams][positions of the tail before the newest]`, flat: the row of each ancestor.
    pub ancestors: Vec<u32>,
    pub num_ancestors: usize,
    pub start_token: u32,
    /// `[beams][steps taken]`, flat, where the rule keeps them.
    pub log_probs: Vec<LogProb>,
    /// By beam, where a sample is drawn: the log-probability over legal continuations, and the same
    /// with its noise, by which beams are in order.
    pub samples: Vec<Sample>,
    /// By beam: its prefix among phrases, in a search for phrases.
    pub phrases: Vec<PhraseNode>,
    /// Of a search for phrases that has begun.
    pub ended: Option<EndedPhrases>,
    /// Steps of a thought that it had no need of.
    pub num_skipped: usize,
    pub failed_step: Option<usize>,
}

/// A beam of a sample.
#[derive(Debug, Clone, Copy)]
pub(super) struct Sample {
    pub log_prob: f32,
    pub noisy: f32,
}

impl Beams {
    /// The one beam that a search starts with.
    pub fn start(start_token: u32) -> Beams {
        Beams {
            scores: vec![0.0],
            ranks: vec![0],
            cursors: Vec::new(),
            are_leaves: false,
            tokens: Vec::new(),
            num_steps: 0,
            ancestors: Vec::new(),
            num_ancestors: 0,
            start_token,
            log_probs: Vec::new(),
            samples: vec![Sample { log_prob: 0.0, noisy: 0.0 }],
            phrases: Vec::new(),
            ended: None,
            num_skipped: 0,
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

    /// The tokens that a beam has chosen.
    pub fn tokens_of(&self, beam: usize) -> &[u32] {
        &self.tokens[beam * self.num_steps..(beam + 1) * self.num_steps]
    }

    pub fn read(&self) -> Result<Vec<Beam>> {
        if let Some(step) = self.failed_step {
            return Err(Error::NonFiniteScores { step });
        }
        if let Some(ended) = &self.ended {
            let beam = |EndedPhrase { score, tokens, node }: &EndedPhrase| Beam {
                tokens: tokens.clone(),
                cursor: None,
                phrase: Some(*node),
                num_skipped: self.num_skipped,
                score: *score,
                log_probs: Vec::new(),
            };
            return Ok(ended.phrases().iter().map(beam).collect());
        }
        let beam = |at: usize| Beam {
            tokens: self.tokens_of(at).to_vec(),
            cursor: self.are_leaves.then(|| self.cursors[at]),
            phrase: None,
            num_skipped: self.num_skipped,
            score: self.scores[at],
            log_probs: match self.log_probs.is_empty() {
                true => Vec::new(),
                false => self.log_probs[at * self.num_steps..(at + 1) * self.num_steps].to_vec(),
            },
        };
        Ok((0..self.len()).map(beam).collect())
    }

    /// Ends the search: the beams are gone, and reading them tells why.
    pub fn fail(&mut self, step: usize) {
        let start_token = self.start_token;
        *self = Beams { failed_step: Some(step), ..Beams::start(start_token) };
        self.scores.clear();
        self.ranks.clear();
    }
}

impl Slot {
    pub(super) fn new(spec: SlotSpec) -> Slot {
        let beams = Beams::start(spec.start_token);
        Slot { spec, positions: Vec::new(), num_tail_pages: 0, beams }
    }

    /// The tail pages that have been begun.
    pub(super) fn tail_pages(&self) -> &[u32] {
        &self.spec.tail_pages[..self.num_tail_pages]
    }

    /// The pages of the beams' newest position, which is begun if it has not been, and the row of the
    /// first page where it begins. Positions of one beam each share a page.
    pub(super) fn append_position(&mut self) -> (&[u32], usize) {
        if self.positions.len() == self.beams.num_ancestors {
            let num_rows = self.beams.len();
            let shared = self
                .positions
                .last()
                .filter(|last| num_rows == 1 && last.num_rows == 1 && last.row + 1 < TAIL_PAGE_LEN);
            let position = match shared {
                Some(last) => TailPosition { row: last.row + 1, ..*last },
                None => {
                    let page = self.num_tail_pages;
                    self.num_tail_pages += num_rows.div_ceil(TAIL_PAGE_LEN);
                    TailPosition { page, row: 0, num_rows }
                }
            };
            self.positions.push(position);
        }
        let TailPosition { page, row, .. } = self.positions[self.positions.len() - 1];
        (&self.spec.tail_pages[page..self.num_tail_pages], row)
    }
}
