//! What queues wait with; their model test puts others in their place.

pub use std::sync::{Arc, Condvar, Mutex};
