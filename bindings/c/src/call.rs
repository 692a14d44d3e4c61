//! Requests on their way: waited for, looked at, cancelled, or answered by a callback.

use std::ffi::c_void;
use std::time::Duration;

use engine::{Answer, Handle, Request, Result};

use crate::answer::SiderealAnswer;
use crate::error::{SIDEREAL_OK, SIDEREAL_PENDING, entry, invalid, keep};
use crate::recommender::{SiderealRecommender, borrow, place};
use crate::request::{SiderealRequest, read_request};

/// A request that was handed over, until it is freed.
pub struct SiderealCall {
    id: u64,
    /// `None` once its answer was handed out.
    handle: Option<Handle>,
}

/// Answers a request and waits for it, and for room in the queue before it.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn sidereal_recommend(
    recommender: *const SiderealRecommender,
    request: *const SiderealRequest,
    out: *mut *mut SiderealAnswer,
) -> i32 {
    // SAFETY: the program's, as the entry's.
    unsafe { answer(recommender, request, out, |_| Ok(())) }
}

/// Scores the request's candidates and waits for it: those that are available come back, best first.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn sidereal_rank(
    recommender: *const SiderealRecommender,
    request: *const SiderealRequest,
    out: *mut *mut SiderealAnswer,
) -> i32 {
    let check = |request: &Request| match request.candidates.is_empty() {
        true => Err(invalid("candidates", "name the items to score")),
        false => Ok(()),
    };
    // SAFETY: the program's, as the entry's.
    unsafe { answer(recommender, request, out, check) }
}

/// # Safety
/// As for entries.
unsafe fn answer(
    recommender: *const SiderealRecommender,
    request: *const SiderealRequest,
    out: *mut *mut SiderealAnswer,
    check: impl FnOnce(&Request) -> Result<()>,
) -> i32 {
    entry(|| {
        // SAFETY: the caller's promise.
        let (out, recommender) = unsafe { (place(out)?, borrow(recommender)?) };
        // SAFETY: the same.
        let request = unsafe { read_request(request)? };
        check(&request)?;
        *out = SiderealAnswer::hand_out(recommender.recommender.recommend(&request)?);
        Ok(SIDEREAL_OK)
    })
}

/// Hands a request over and does not wait: a full queue is SIDEREAL_OVERLOADED.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn sidereal_submit(
    recommender: *const SiderealRecommender,
    request: *const SiderealRequest,
    out: *mut *mut SiderealCall,
) -> i32 {
    entry(|| {
        // SAFETY: the program's recommender, place and request.
        let (out, recommender) = unsafe { (place(out)?, borrow(recommender)?) };
        // SAFETY: the same.
        let request = unsafe { read_request(request)? };
        let handle = recommender.recommender.submit(request)?;
        *out = Box::into_raw(Box::new(SiderealCall { id: handle.id(), handle: Some(handle) }));
        Ok(SIDEREAL_OK)
    })
}

/// Waits for the answer to a call for at most `timeout_us`: SIDEREAL_PENDING where it is not there then, at
/// once for 0, and never for UINT64_MAX. Other statuses end the call, which still has to be freed.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn sidereal_call_wait(
    call: *mut SiderealCall,
    timeout_us: u64,
    out: *mut *mut SiderealAnswer,
) -> i32 {
    entry(|| {
        // SAFETY: the program's place, and NULL or a call that was handed out and not freed.
        let (out, call) = unsafe { (place(out)?, call.as_mut()) };
        let call = call.ok_or_else(|| invalid("call", "it is NULL"))?;
        let mut handle = call
            .handle
            .take()
            .ok_or_else(|| invalid("call", "its answer was handed out already"))?;
        let answer = match timeout_us {
            u64::MAX => handle.wait(),
            us => match handle.wait_for(Duration::from_micros(us)) {
                Some(answer) => answer,
                None => {
                    call.handle = Some(handle);
                    return Ok(SIDEREAL_PENDING);
                }
            },
        };
        *out = SiderealAnswer::hand_out(answer?);
        Ok(SIDEREAL_OK)
    })
}

/// Names a call's request, for sidereal_cancel; 0 for NULL.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn sidereal_call_id(call: *const SiderealCall) -> u64 {
    // SAFETY: NULL, or a call that was handed out and not freed.
    unsafe { call.as_ref() }.map_or(0, |call| call.id)
}

/// Frees a call. A request that was not answered yet is cancelled.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn sidereal_call_free(call: *mut SiderealCall) {
    entry(|| {
        if !call.is_null() {
            // SAFETY: it was handed out, and is freed once.
            drop(unsafe { Box::from_raw(call) });
        }
        Ok(SIDEREAL_OK)
    });
}

/// Takes an answer, on the engine's own thread, for which all requests wait: hand it to a thread of your own.
/// `answer` is the callback's to free, NULL where `status` is not SIDEREAL_OK. It may submit and cancel; calls
/// that wait fail there.
pub type SiderealCallback =
    Option<unsafe extern "C" fn(user_data: *mut c_void, status: i32, answer: *mut SiderealAnswer)>;

/// A pointer of the program's, on its way to the callback on another thread.
struct UserData(*mut c_void);

// SAFETY: the library does nothing with the pointer but hand it back.
unsafe impl Send for UserData {}

impl UserData {
    fn pointer(self) -> *mut c_void {
        self.0
    }
}

/// Hands a request over whose answer goes to `callback`, which is called exactly once unless this returns
/// an error. `id`, where it is not NULL, gets the request's name for sidereal_cancel.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn sidereal_submit_with(
    recommender: *const SiderealRecommender,
    request: *const SiderealRequest,
    callback: SiderealCallback,
    user_data: *mut c_void,
    id: *mut u64,
) -> i32 {
    entry(|| {
        // SAFETY: the program's recommender and request.
        let (recommender, request) = unsafe { (borrow(recommender)?, read_request(request)?) };
        let callback = callback.ok_or_else(|| invalid("callback", "it is NULL"))?;
        let user_data = UserData(user_data);
        let deliver = move |answer: Result<Answer>| {
            let (status, answer) = match answer {
                Ok(answer) => (SIDEREAL_OK, SiderealAnswer::hand_out(answer)),
                Err(error) => (keep(&error), std::ptr::null_mut()),
            };
            // SAFETY: a function of the program, with what it was promised.
            unsafe { callback(user_data.pointer(), status, answer) };
        };
        let request_id = recommender.recommender.submit_with(request, deliver)?;
        if !id.is_null() && id.is_aligned() {
            // SAFETY: the program's number.
            unsafe { id.write(request_id) };
        }
        Ok(SIDEREAL_OK)
    })
}

/// Ends a request by its name: it fails with SIDEREAL_CANCELLED, and what it held is free at the next step.
/// The name of a request that was answered does nothing.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn sidereal_cancel(recommender: *const SiderealRecommender, id: u64) -> i32 {
    entry(|| {
        // SAFETY: the program's recommender.
        unsafe { borrow(recommender)? }.recommender.cancel(id)?;
        Ok(SIDEREAL_OK)
    })
}
