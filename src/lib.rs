//! Sidereal.
pub mod backend;
pub mod catalog;
mod engine;
mod error;
mod mapping;
pub mod models;
mod request;
mod tensor;
pub use engine::{Engine, EngineOptions, Phases};
pub use error::{Error, Result};
pub use request::*;
pub use tensor::{Dtype, Tensor};
