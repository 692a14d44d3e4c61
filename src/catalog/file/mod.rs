//! A catalog on disk: the compiled file and, beside it, the log of later changes.

pub mod change_log;
pub(crate) mod format;
mod lock;
mod logged;
mod replace;
