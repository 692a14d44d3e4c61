//! Answers.

use std::sync::OnceLock;

use engine::{Answer, Recommendation, Timings};

use crate::error::{SIDEREAL_OK, entry, invalid};
use crate::structs::{SizedStruct, write};
use crate::text::SiderealText;

/// An answer, until it is freed.
pub struct SiderealAnswer {
    answer: Answer,
    timings: Timings,
    /// Made when it is first asked for.
    json: OnceLock<String>,
}

impl SiderealAnswer {
    /// An answer on its way out.
    pub fn hand_out(mut answer: Answer) -> *mut SiderealAnswer {
        let timings = answer.timings.take().unwrap_or_default();
        let json = OnceLock::new();
        Box::into_raw(Box::new(SiderealAnswer { answer, timings, json }))
    }
}

/// The counts, versions and times of an answer.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct SiderealAnswerInfo {
    /// sizeof(sidereal_answer_info).
    pub struct_size: usize,
    /// Items.
    pub num_items: usize,
    /// The state of the catalog that was searched.
    pub snapshot: u64,
    /// The weights that answered: 1 as the model was opened.
    pub weights_version: u64,
    /// Tokens of the context.
    pub tokens: usize,
    /// Those of them that the prefix cache had.
    pub cached_tokens: usize,
    /// Names of the history that the catalog does not have and that were left out.
    pub num_skipped: usize,
    /// From submission to admission, in microseconds.
    pub queue_us: u64,
    /// From admission to the answer.
    pub engine_us: u64,
    /// Both together.
    pub total_us: u64,
}

// SAFETY: numbers alone.
unsafe impl SizedStruct for SiderealAnswerInfo {
    const NAME: &'static str = "sidereal_answer_info";
}

/// One item of an answer. What it points to belongs to the answer.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct SiderealItem {
    /// sizeof(sidereal_item).
    pub struct_size: usize,
    /// The item's name.
    pub name: SiderealText,
    /// Its title, where the request asks for titles and the catalog has one.
    pub title: SiderealText,
    /// Its semantic ID.
    pub codes: *const u16,
    /// Levels of the semantic ID.
    pub num_codes: usize,
    /// Natural log of the probability of the semantic ID.
    pub score: f32,
}

// SAFETY: numbers, pointers and texts.
unsafe impl SizedStruct for SiderealItem {
    const NAME: &'static str = "sidereal_item";
}

/// Writes the counts, versions and times of an answer.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn sidereal_answer_read(
    answer: *const SiderealAnswer,
    info: *mut SiderealAnswerInfo,
) -> i32 {
    entry(|| {
        // SAFETY: NULL, or an answer that was handed out and not freed.
        let SiderealAnswer { answer, timings, .. } =
            unsafe { answer.as_ref() }.ok_or_else(|| invalid("answer", "it is NULL"))?;
        let value = SiderealAnswerInfo {
            struct_size: 0,
            num_items: answer.items.len(),
            snapshot: answer.snapshot.number(),
            weights_version: answer.weights_version,
            tokens: answer.tokens,
            cached_tokens: answer.cached_tokens,
            num_skipped: answer.unknown_items.history.count,
            queue_us: timings.queued_us,
            engine_us: timings.total_us.saturating_sub(timings.queued_us),
            total_us: timings.total_us,
        };
        // SAFETY: the program's struct.
        unsafe { write(info, &value)? };
        Ok(SIDEREAL_OK)
    })
}

/// Writes the item at an index, best first.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn sidereal_answer_item(
    answer: *const SiderealAnswer,
    index: usize,
    item: *mut SiderealItem,
) -> i32 {
    entry(|| {
        // SAFETY: NULL, or an answer that was handed out and not freed.
        let SiderealAnswer { answer, .. } =
            unsafe { answer.as_ref() }.ok_or_else(|| invalid("answer", "it is NULL"))?;
        let found: &Recommendation = answer.items.get(index).ok_or_else(|| {
            invalid("index", format!("{index} is not below {}", answer.items.len()))
        })?;
        let codes = found.sid.codes();
        let value = SiderealItem {
            struct_size: 0,
            name: SiderealText::of(&found.item),
            title: found.title.as_deref().map_or(SiderealText::NONE, SiderealText::of),
            codes: codes.as_ptr(),
            num_codes: codes.len(),
            score: found.score,
        };
        // SAFETY: the program's struct.
        unsafe { write(item, &value)? };
        Ok(SIDEREAL_OK)
    })
}

/// The whole answer as JSON, as the command line writes it: groups, log-probabilities and read tokens
/// are there. {NULL, 0} for NULL.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn sidereal_answer_json(answer: *const SiderealAnswer) -> SiderealText {
    // SAFETY: NULL, or an answer that was handed out and not freed.
    let Some(SiderealAnswer { answer, json, .. }) = (unsafe { answer.as_ref() }) else {
        return SiderealText::NONE;
    };
    let to_json = || serde_json::to_string(answer).expect("answers have a JSON form");
    SiderealText::of(json.get_or_init(to_json))
}

/// Frees an answer.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn sidereal_answer_free(answer: *mut SiderealAnswer) {
    if !answer.is_null() {
        // SAFETY: it was handed out by `hand_out`, and is freed once.
        drop(unsafe { Box::from_raw(answer) });
    }
}
