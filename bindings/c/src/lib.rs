//! The C interface: `include/sidereal.h` is made of this crate, and a test holds it to that.
//!
//! Each function is an entry: it catches panics, turns errors into a status, and keeps their words for
//! [`sidereal_last_error`](error::sidereal_last_error). The types that cross are in `structs`.

mod answer;
mod call;
mod catalog;
mod error;
mod recommender;
mod request;
mod structs;
mod text;
mod weights;
