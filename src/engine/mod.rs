//! From a request to its answer.
//!
//! Requests are batched **continuously**: in every step some read their prompts, in chunks, and
//! others extend their beams by a level; all rows of a step share its matrix products. What a
//! request needs is known when it arrives (pages for its context and tails, beam rows), so it is
//! admitted when that is free ([`schedule`](crate::schedule)) and then always finishes. The answer
//! to a request is the same in any company and on any number of threads, on one kind of CPU to the last bit.
//!
//! Computed contexts stay as long as there is room ([`prefix_cache`](crate::prefix_cache)): a
//! request that begins like an earlier one reads only what is new.
//!
//! An engine has **one owner**: a step needs `&mut`, and each answer goes to the place that its
//! request named ([`Reply`]), so that nobody can take another's answer. Many callers share an engine
//! through a [`Recommender`](crate::Recommender), which owns it on a thread of its own.
//!
//! | file | what it holds |
//! | --- | --- |
//! | `engine` | the engine: opening, asking, stepping |
//! | `prepare` | a request is checked and becomes work, on any thread |
//! | `fields` | values and combinations of fields that no request may have |
//! | `phrases` | the phrases of the catalog, and those that a request searches |
//! | `thoughts` | what a request thinks before it searches |
//! | `lookup` | names in a request become items; unknown ones are left out |
//! | `program` | the stages of a request, and what they lease |
//! | `scheduler` | requests that wait and run, their pages: host state alone |
//! | `step` | one step: admit, plan, batch, run, complete |
//! | `batch` | the rows of a step and the pass over them |
//! | `answer` | beams become an answer, which goes where its request said |
//! | `feed` | many requests, a few at a time |
//! | `weights` | the network is loaded, and replaced |
//! | `probe` | small requests of the engine's own, apart from all others |

mod answer;
mod batch;
#[allow(clippy::module_inception)] // the module's main type has the module's name
mod engine;
mod feed;
mod fields;
mod lookup;
mod options;
mod phrases;
mod prepare;
mod probe;
mod program;
mod run;
mod scheduler;
mod status;
mod step;
mod thoughts;
mod weights;

pub use answer::Reply;
pub use engine::Engine;
pub(crate) use feed::Feed;
pub(crate) use fields::check_snapshot;
pub(crate) use lookup::{Known, Wishes};
pub use options::{EngineOptions, MAX_THREADS};
pub(crate) use prepare::Arrival;
pub use prepare::{Prepared, Preparer};
pub use status::{EngineStatus, Phases};
pub(crate) use weights::ReplaceWeights;
