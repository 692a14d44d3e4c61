//! What the exchange waits with; its model test puts others in their place.

pub use std::sync::{Arc, Condvar, Mutex};
