//! Sidereal.
pub mod backend;
pub mod catalog;
mod error;
mod mapping;
pub mod models;
mod request;
mod tensor;
pub use error::{Error, Result};
pub use request::*;
pub use tensor::{Dtype, Tensor};
