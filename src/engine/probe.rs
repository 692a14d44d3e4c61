//! Small requests of the engine's own, apart from those of callers: to warm a device up, and to
//! find weights that give no score before anybody is answered with them.

use std::sync::Arc;

use super::engine::Engine;
use super::phrases::PhraseIndex;
use super::prepare::Preparer;
use super::scheduler::Scheduler;
use super::status::Unobserved;
use crate::answer::Answer;
use crate::backend::{Backend, NO_TOKEN};
use crate::error::{Error, Result};
use crate::metrics::Metrics;
use crate::request::Request;
use crate::search::Constraint;

/// Inputs that are tried before weights are said to be broken.
const NUM_PROBES: usize = 4;

impl<B: Backend> Engine<B> {
    /// Tries the network on histories of one item. One finite answer is enough, so sound weights
    /// cost one small request. Nothing may run meanwhile, and cached contexts are dropped.
    ///
    /// # Errors
    /// [`Error::NonFiniteModel`] where each input overflows; [`Error::Device`].
    pub(super) fn probe(&mut self) -> Result<()> {
        let mut found = Ok(());
        for number in 0..NUM_PROBES {
            let request = self.preparer.probe(number);
            found = match self.recommend_apart(&request) {
                Err(Error::NonFiniteScores { step }) => Err(Error::NonFiniteModel { step }),
                Err(error @ Error::Device { .. }) => return Err(error),
                // Options that leave no room for the request are no fault of the weights.
                _ => return Ok(()),
            };
        }
        found
    }

    /// Answers a request while nothing runs, without those that wait: it is not counted, and its
    /// context is not cached. Contexts that are cached are dropped, as it takes their pages.
    ///
    /// # Errors
    /// Those of [`recommend`](Engine::recommend).
    pub(super) fn recommend_apart(&mut self, request: &Request) -> Result<Answer> {
        self.scheduler.clear_cache();
        let alone = Scheduler::new(&self.scheduler_spec, Arc::new(Metrics::default()));
        let scheduler = std::mem::replace(&mut self.scheduler, alone);
        let phases = std::mem::take(&mut self.phases);
        let answer = self.recommend(request);
        (self.scheduler, self.phases) = (scheduler, phases);
        self.unobserved = Unobserved::default();
        answer
    }
}

impl Preparer {
    /// A request with a history of one item, whether or not the catalog has it: the codes are
    /// spread over each level, by the number of the probe.
    fn probe(&self, number: usize) -> Request {
        let mut tokens = self.layout.prompt.fixed_tokens();
        for level in &self.layout.levels {
            let known: Vec<u32> = level.iter().copied().filter(|&it| it != NO_TOKEN).collect();
            tokens.extend(known.get(number * known.len() / NUM_PROBES));
        }
        tokens.extend(self.phrases.iter().map(PhraseIndex::end));
        let mut request = Request::from_tokens(tokens);
        if self.phrases.is_none() {
            // Without the trie it needs no item that is available.
            request.constraint = Constraint::Level;
        }
        request.beams = 1;
        request.top_k = 1;
        request
    }
}
