//! Sidereal: exact recommendations from generative models.
//!
//! A generative recommender *writes* the next item as a semantic ID, a few discrete codes, instead
//! of scoring every item. Sidereal runs such models: a long history in, three or four codes out,
//! tens to hundreds of beams, and every answer an item that exists and that the caller allows.
//!
//! ```no_run
//! use std::{path::Path, sync::Arc};
//! use sidereal::{Recommender, RecommenderOptions, Request, catalog::Catalog};
//!
//! # fn main() -> sidereal::Result<()> {
//! let catalog = Arc::new(Catalog::open(Path::new("models/industrial/items.jsonl"))?);
//! let options = RecommenderOptions::new("cpu"); // or "cuda:0"
//! let recommender = Recommender::open(Path::new("models/industrial"), catalog, &options)?;
//! let request = Request::from_history(["168", "278"]).with_exclude(["168"]);
//! let answer = recommender.recommend(&request)?;
//! for found in &answer.items {
//!     println!("{} {:.3}", found.item, found.score);
//! }
//! # Ok(())
//! # }
//! ```
//!
//! # The life of a request
//!
//! 1. [`Recommender::recommend`] checks it, on the caller's thread, and turns its history into tokens
//!    ([`engine::Preparer`], [`models::config`]).
//! 2. It waits until the pages that it needs are free ([`schedule`], [`pages`]), and then has a slot in
//!    every step until it is answered ([`engine`]).
//! 3. The network reads what is new of its tokens ([`prefix_cache`]) and leaves what all beams share
//!    ([`models`]).
//! 4. At each level the output head is evaluated for the codes that the level can have, and the best
//!    legal continuations of all beams become the new beams ([`backend`], [`catalog::trie`],
//!    [`catalog::allowed`]).
//! 5. The network reads the beams' newest codes: their KV goes to the tails, which are never copied.
//! 6. After the last level the beams are leaves of the catalog's trie; their items are the answer.
//!
//! From the first step to the last a request sees one [`catalog::Snapshot`], whatever a
//! [`CatalogWriter`] does meanwhile.
//!
//! # The floors
//!
//! A module uses lower floors only, and a test holds it to that: the command line, the
//! [`Recommender`] > [`engine`], the writer, [`quantizer`] > [`models`], [`prompt`] > [`backend`], answers > bookkeeping ([`catalog`],
//! [`schedule`], [`cost`], [`pages`], [`prefix_cache`]) > requests, errors, semantic IDs, tensors.
//!
//! # What is absent, deliberately
//!
//! - Bookkeeping holds no weights, no device, no thread and no clock: time comes in as an argument.
//! - An admitted request is never stopped to make room for another: what it needs was taken at once.
//! - The backend does not know what a request is; networks hold no `unsafe` and no `cfg`, and each
//!   is written once for all devices.
//! - A forbidden code is not a code with a low score: it is never considered.
//! - An answer does not depend on the other requests of a step, on how its prompt is cut, on what is
//!   cached or on the number of threads, on one kind of CPU to the last bit. (On a GPU, up to the
//!   order in which cuBLASLt sums for as many rows.)
//! - A device is not waited for between the levels of a search ([`backend::cuda`]).

mod answer;
mod answering;
pub mod backend;
pub mod catalog;
mod checkpoint;
#[doc(hidden)] // for tests and benchmarks
pub mod cost;
pub mod device;
pub mod engine;
mod error;
mod features;
pub mod json;
pub mod lines;
mod mapping;
pub mod metrics;
pub mod models;
#[doc(hidden)] // for tests and benchmarks
pub mod pages;
#[doc(hidden)] // for tests and benchmarks
pub mod prefix_cache;
pub mod prompt;
pub mod quantizer;
mod recommender;
mod recommender_options;
mod request;
mod retriever;
#[doc(hidden)] // for tests and benchmarks
pub mod schedule;
mod search;
#[cfg(feature = "server")]
pub mod server;
mod service;
mod tensor;
pub mod vectors;
pub mod wire;
mod writer;

pub use answer::{
    Answer, Group, ReadToken, Recommendation, Sequence, TaskScore, Thought, Timings,
    UnknownByField, UnknownNames,
};
pub use answering::ModelKind;
pub use device::Device;
pub use engine::{Engine, EngineOptions, EngineStatus, MAX_THREADS, Phases};
pub use error::{Error, ErrorKind, Result};
pub use features::Features;
pub use recommender::{Recommender, Status};
pub use recommender_options::RecommenderOptions;
pub use request::{
    Forced, Input, LongHistory, MAX_BEAMS, NamedToken, Priority, Request, SharedSid, Think,
    UnknownItems,
};
pub use retriever::{Ranker, Retriever};
pub use search::{
    Constraint, EarlyStopping, Merge, Normalization, PhraseRule, PhraseSearch, Sampling,
};
pub use service::Handle;
pub use tensor::{Dtype, Tensor};
pub use writer::{Applied, CatalogWriter, Durability, Replaced, WriterOptions};

/// The Rust code of the pages, compiled by `cargo test --doc`.
#[cfg(doctest)]
mod code_of_pages {
    #[doc = include_str!("../README.md")]
    struct Readme;
    #[doc = include_str!("../ARCHITECTURE.md")]
    struct Architecture;
    #[doc = include_str!("../CONTRIBUTING.md")]
    struct Contributing;
    #[doc = include_str!("../SECURITY.md")]
    struct Security;
    #[doc = include_str!("../docs/benchmarks.md")]
    struct Benchmarks;
    #[doc = include_str!("../docs/c.md")]
    struct CInterface;
    #[doc = include_str!("../docs/catalog.md")]
    struct CatalogPage;
    #[doc = include_str!("../docs/cli.md")]
    struct CommandLine;
    #[doc = include_str!("../docs/gpu.md")]
    struct Gpu;
    #[doc = include_str!("../docs/models.md")]
    struct Models;
    #[doc = include_str!("../docs/prompts.md")]
    struct Prompts;
    #[doc = include_str!("../docs/ranking.md")]
    struct Ranking;
    #[doc = include_str!("../docs/serving.md")]
    struct Serving;
}
