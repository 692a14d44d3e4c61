//! A model folder of either kind, opened to answer requests.

use std::sync::Arc;

use sidereal::catalog::Catalog;
use sidereal::{Answer, Ranker, Recommender, Request, Result, Retriever};

/// An opened model folder, which answers requests.
pub enum Served {
    /// A model that writes semantic IDs.
    Writer(Recommender),
    /// A model that scores items by vectors.
    Vectors(Box<Retriever>),
    /// A model that scores the candidates of a request.
    Scores(Box<Ranker>),
}

impl Served {
    /// Answers a request; `callback` is called with the answer now or later, unless this returns an
    /// error.
    pub fn submit_with(
        &self,
        request: Request,
        callback: impl FnOnce(Result<Answer>) + Send + 'static,
    ) -> Result<()> {
        match self {
            Served::Writer(recommender) => recommender.submit_with(request, callback).map(drop),
            Served::Vectors(retriever) => {
                callback(Ok(retriever.recommend(&request)?));
                Ok(())
            }
            Served::Scores(ranker) => {
                callback(Ok(ranker.recommend(&request)?));
                Ok(())
            }
        }
    }

    /// The catalog that is searched.
    pub fn catalog(&self) -> &Arc<Catalog> {
        match self {
            Served::Writer(recommender) => recommender.catalog(),
            Served::Vectors(retriever) => retriever.catalog(),
            Served::Scores(ranker) => ranker.catalog(),
        }
    }

    /// Whether scores are logs of probabilities.
    pub fn has_probabilities(&self) -> bool {
        matches!(self, Served::Writer(_))
    }
}
