//! What answers a recommender's requests, as far as callers' threads need it.

use std::path::Path;
use std::sync::Arc;

use crate::catalog::Catalog;
use crate::catalog::sid::Sid;
use crate::engine::{Arrival, Prepared, Preparer, ReplaceWeights, Reply};
use crate::error::{Error, Result};
use crate::metrics::Metrics;
use crate::recommender_options::RecommenderOptions;
use crate::request::{Input, Request};
use crate::retriever::{Ranker, Retriever};
use crate::schedule::RequestId;
use crate::service::{AnswersWhole, Message, Reception, no_new_weights};

/// The kind of a model: what it makes of a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum ModelKind {
    /// It writes semantic IDs or phrases; scores are log-probabilities.
    Writer,
    /// It makes a vector of a history; scores are products with items' vectors, or distances.
    Vectors,
    /// It scores the candidates of a request, by task.
    Scores,
}

impl ModelKind {
    /// Reads the kind of a folder's model from the `family` in its `sidereal.json`.
    ///
    /// # Errors
    /// The file's, where it is there.
    pub fn of(folder: &Path) -> Result<ModelKind> {
        Ok(match () {
            () if Ranker::serves(folder)? => ModelKind::Scores,
            () if Retriever::serves(folder)? => ModelKind::Vectors,
            () => ModelKind::Writer,
        })
    }
}

/// A network that answers requests, as callers' threads see it.
pub(crate) enum Answering {
    /// An engine, which writes semantic IDs or phrases.
    Writer { preparer: Arc<Preparer>, loader: Arc<dyn ReplaceWeights> },
    /// A network that answers whole requests.
    Whole(ModelKind, Arc<Reception>),
}

impl Answering {
    /// Opens a folder whose network answers whole requests; `None` for one that writes.
    ///
    /// # Errors
    /// Those of [`Retriever::open`] and [`Ranker::open`]; [`Error::InvalidOption`] for an adapter's
    /// base.
    pub fn open_whole(
        folder: &Path,
        catalog: &Arc<Catalog>,
        options: &RecommenderOptions,
    ) -> Result<Option<(ModelKind, Arc<Reception>)>> {
        let kind = ModelKind::of(folder)?;
        if kind != ModelKind::Writer && options.base.is_some() {
            let reason = "this network has no adapters; leave it out".into();
            return Err(Error::InvalidOption { option: "base", reason });
        }
        let network: Arc<dyn AnswersWhole> = match kind {
            ModelKind::Writer => return Ok(None),
            ModelKind::Vectors => Arc::new(Retriever::open(folder, Arc::clone(catalog), options)?),
            ModelKind::Scores => Arc::new(Ranker::open(folder, Arc::clone(catalog), options)?),
        };
        Ok(Some((kind, Arc::new(Reception::new(network)))))
    }

    pub fn kind(&self) -> ModelKind {
        match self {
            Answering::Writer { .. } => ModelKind::Writer,
            Answering::Whole(kind, _) => *kind,
        }
    }

    pub fn catalog(&self) -> &Arc<Catalog> {
        match self {
            Answering::Writer { preparer, .. } => preparer.catalog(),
            Answering::Whole(_, reception) => reception.network.catalog(),
        }
    }

    pub fn metrics(&self) -> &Metrics {
        match self {
            Answering::Writer { preparer, .. } => preparer.metrics(),
            Answering::Whole(_, reception) => &reception.metrics,
        }
    }

    pub fn tokens_of(&self, sid: &Sid) -> Vec<u32> {
        match self {
            Answering::Writer { preparer, .. } => preparer.tokens_of(sid),
            Answering::Whole(..) => Vec::new(),
        }
    }

    pub fn max_context(&self) -> usize {
        match self {
            Answering::Writer { preparer, .. } => preparer.max_context(),
            Answering::Whole(_, reception) => reception.network.max_items(),
        }
    }

    pub fn input_tokens(&self, input: &Input) -> Result<Vec<u32>> {
        match self {
            Answering::Writer { preparer, .. } => preparer.input_tokens(input),
            Answering::Whole(..) => Err(Error::Unsupported {
                what: "the tokens of an input to a network that reads items".into(),
                way_out: "it reads the items of the history themselves".into(),
            }),
        }
    }

    /// Tells whether a request's text has to become tokens, which takes long.
    pub fn reads_text(&self, request: &Request) -> bool {
        match self {
            Answering::Writer { preparer, .. } => preparer.reads_text(request),
            Answering::Whole(..) => false,
        }
    }

    /// Names a request that is handed over now.
    pub fn arrival(&self) -> Arrival {
        match self {
            Answering::Writer { preparer, .. } => preparer.arrival(),
            Answering::Whole(_, reception) => reception.arrival(),
        }
    }

    /// Checks a request; one that is refused is counted.
    ///
    /// # Errors
    /// The request's.
    pub fn prepare(&self, request: Request) -> Result<Checked> {
        match self {
            Answering::Writer { preparer, .. } => preparer.prepare(request).map(Checked::Prepared),
            Answering::Whole(_, reception) => {
                let arrival = reception.arrival();
                let checked = reception.network.check(&request);
                checked.inspect_err(|error| reception.metrics.request_refused(error))?;
                Ok(Checked::Whole(request, arrival))
            }
        }
    }

    /// Gives what lays out new weights.
    ///
    /// # Errors
    /// [`Error::Unsupported`] for a network that takes none.
    pub fn loader(&self) -> Result<&Arc<dyn ReplaceWeights>> {
        match self {
            Answering::Writer { loader, .. } => Ok(loader),
            Answering::Whole(..) => Err(no_new_weights()),
        }
    }
}

/// A request that a caller's thread has checked.
#[allow(clippy::large_enum_variant)] // nearly all are of the largest variant
pub(crate) enum Checked {
    Prepared(Prepared),
    Whole(Request, Arrival),
}

impl Checked {
    pub fn id(&self) -> RequestId {
        match self {
            Checked::Prepared(prepared) => prepared.id(),
            Checked::Whole(_, arrival) => arrival.id,
        }
    }

    pub fn with_reply(self, reply: Reply) -> Message {
        match self {
            Checked::Prepared(prepared) => Message::Enqueue(prepared, reply),
            Checked::Whole(request, arrival) => Message::Submit(request, arrival, reply),
        }
    }
}
