//! A catalog on disk: the compiled file and, beside it, the log of later changes and the lock.

pub mod change_log;
pub mod check;
pub(crate) mod format;
pub(crate) mod lock;
mod log_format;
mod logged;
mod replace;

pub(crate) use replace::resolve;
