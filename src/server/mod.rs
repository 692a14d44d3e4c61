//! HTTP and gRPC in front of [`Recommender`](crate::Recommender)s: what `sidereal serve` runs.
//!
//! A [`Server`] opens models by name and version and answers several protocols, each a **door** to
//! the same operations (`operations`):
//!
//! | door | where | protocol |
//! | --- | --- | --- |
//! | JSON | `/v1/recommend`, `/v1/rank`, `/v1/score`, `/v1/catalog`, `/v1/models` | the request line of the command line |
//! | Open Inference Protocol | `/v2/...` and gRPC | version 2 with Triton's binary tensors, configuration, statistics and repository |
//! | SGLang | `/generate` | what SGLang's load client and router send |
//! | OpenAI | `/v1/completions`, `/v1/chat/completions` | one choice an item |
//!
//! `GET /metrics` is for Prometheus, `GET /` a page for people, `GET /openapi.json` the description
//! of the JSON doors.
//!
//! # Invariants
//!
//! - A connection that goes away cancels its requests: the future of a call is dropped, and with it
//!   the [`Handle`](crate::Handle)s that it waits for.
//! - Everything that a client can make large is bounded before it is read: headers, bodies, batches,
//!   connections ([`Limits`]).
//! - Nothing that may take long runs on the threads that serve connections.

mod access;
mod answer;
mod completions;
mod door;
mod envelope;
mod error;
mod exposition;
mod feed;
mod generate;
mod json;
mod listen;
mod models;
mod openapi;
mod operations;
mod options;
mod page;
mod protocol;
mod router;
#[allow(clippy::module_inception)] // the file is named after its type
mod server;
mod state;
mod tls;

pub use options::{Limits, ModelSource, ServerOptions, TlsFiles, check_token, read_token};
pub use server::Server;
