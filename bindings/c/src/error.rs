//! Statuses, and the words of errors.

use std::cell::RefCell;
use std::panic::{AssertUnwindSafe, catch_unwind};

use engine::{Error, ErrorKind};

use crate::text::SiderealText;

/// All is well.
pub const SIDEREAL_OK: i32 = 0;
/// The caller can put it right: change the request, the change or the option.
pub const SIDEREAL_CALLER: i32 = 1;
/// The owner of the files can: repair or replace them.
pub const SIDEREAL_FILES: i32 = 2;
/// Nobody can: send the request again later, or to another machine.
pub const SIDEREAL_OVERLOADED: i32 = 3;
/// The operator of the machine can: its device is missing, lost or out of memory.
pub const SIDEREAL_DEVICE: i32 = 4;
/// The authors can: report it.
pub const SIDEREAL_INTERNAL: i32 = 5;
/// The request was cancelled.
pub const SIDEREAL_CANCELLED: i32 = 6;
/// The deadline went by, or would have.
pub const SIDEREAL_DEADLINE_EXCEEDED: i32 = 7;
/// Not an error: the answer is not there yet.
pub const SIDEREAL_PENDING: i32 = 8;

/// The last error of a thread.
#[derive(Default)]
struct Last {
    message: String,
    code: &'static str,
    retry_after_ms: u64,
}

thread_local! {
    static LAST: RefCell<Last> = RefCell::default();
}

/// The status of an error.
pub fn status_of(error: &Error) -> i32 {
    match error {
        Error::Cancelled => SIDEREAL_CANCELLED,
        Error::DeadlineExceeded { .. } => SIDEREAL_DEADLINE_EXCEEDED,
        error => match error.kind() {
            ErrorKind::Caller => SIDEREAL_CALLER,
            ErrorKind::Files => SIDEREAL_FILES,
            ErrorKind::Overloaded => SIDEREAL_OVERLOADED,
            ErrorKind::Device => SIDEREAL_DEVICE,
            _ => SIDEREAL_INTERNAL,
        },
    }
}

/// Keeps an error's words for this thread, and returns its status.
pub fn keep(error: &Error) -> i32 {
    let retry_after = error.retry_after().unwrap_or_default();
    set(error.code(), error.to_string(), retry_after.as_millis() as u64);
    status_of(error)
}

fn set(code: &'static str, message: String, retry_after_ms: u64) {
    LAST.with_borrow_mut(|last| *last = Last { message, code, retry_after_ms });
}

/// The error of an argument that cannot be.
pub fn invalid(field: &'static str, reason: impl Into<String>) -> Error {
    Error::InvalidField { field, reason: reason.into() }
}

/// Runs an entry: what it returns is the status, and no panic leaves it.
pub fn entry(work: impl FnOnce() -> Result<i32, Error>) -> i32 {
    match catch_unwind(AssertUnwindSafe(work)) {
        Ok(Ok(status)) => status,
        Ok(Err(error)) => keep(&error),
        Err(_) => {
            set("internal", "the library panicked; this is a fault of it, report it".into(), 0);
            SIDEREAL_INTERNAL
        }
    }
}

/// Returns the message of the last error on this thread: what happened, the limit, the way out. It holds
/// until the next error on the thread. Inside of a callback it says why the request failed.
#[unsafe(no_mangle)]
pub extern "C" fn sidereal_last_error() -> SiderealText {
    LAST.with_borrow(|last| SiderealText::of(&last.message))
}

/// Returns the stable name of the last error on this thread, such as "unknown_item".
#[unsafe(no_mangle)]
pub extern "C" fn sidereal_last_error_code() -> SiderealText {
    LAST.with_borrow(|last| SiderealText::of(last.code))
}

/// Returns in how many milliseconds a request may come again, as predicted, after SIDEREAL_OVERLOADED or
/// SIDEREAL_DEADLINE_EXCEEDED; 0 where nothing is predicted.
#[unsafe(no_mangle)]
pub extern "C" fn sidereal_last_retry_after_ms() -> u64 {
    LAST.with_borrow(|last| last.retry_after_ms)
}
