//! What can go wrong, grouped by who can put it right.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

/// The result of every fallible call of this crate.
pub type Result<T> = std::result::Result<T, Error>;

/// Who can put an error right.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum ErrorKind {
    /// The caller: change the request, the change or the option.
    Caller,
    /// The owner of the files: repair or replace them.
    Files,
    /// Nobody: send the request again later, or to another machine.
    Overloaded,
    /// The operator of the machine: its device is missing, lost or out of memory.
    Device,
    /// The authors of Sidereal or of the model: report it.
    Internal,
}

impl ErrorKind {
    /// The kind's name in JSON: `caller`, `files`, `overloaded`, `device` or `internal`.
    pub fn name(self) -> &'static str {
        match self {
            ErrorKind::Caller => "caller",
            ErrorKind::Files => "files",
            ErrorKind::Overloaded => "overloaded",
            ErrorKind::Device => "device",
            ErrorKind::Internal => "internal",
        }
    }
}

/// Every error of this crate. The text says what happened, the limit, and the way out.
#[derive(Debug, Clone, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    // The caller's: change the request.
    /// A request names an item that the catalog does not have, and wants an error for it; or it names
    /// items in its history or as candidates, and none of them is known.
    #[error(
        "item {item:?} of \"{field}\" is not in the catalog; leave it out, or put it into the catalog; with \"unknown_items\": \"skip\" a request goes without unknown items as long as one is known"
    )]
    UnknownItem {
        /// The field that names it: `history` or `candidates`.
        field: &'static str,
        /// The first such item as the request names it; of a name over 128 bytes its beginning.
        item: String,
    },
    /// A request has neither history nor tokens, or an empty one.
    #[error(
        "the request is empty; give at least one item in \"history\" or one token in \"tokens\""
    )]
    EmptyInput,
    /// A token is not in the model's vocabulary.
    #[error(
        "token {token} at position {position} is outside the model's vocabulary of {vocab_size} tokens"
    )]
    TokenOutOfRange {
        /// The token.
        token: u64,
        /// Its index in the input.
        position: usize,
        /// The number of tokens that the model knows.
        vocab_size: usize,
    },
    /// The input has more tokens than the model or the engine takes.
    #[error(
        "the input has {len} tokens, the engine takes at most {max}; send the newest items only, ask for that by \"long_history\": \"cut\", set max_items in the model's sidereal.json, or, where the model has more positions (max_position_embeddings, and sliding_window where its layers have one), raise max_context (--max-context)"
    )]
    HistoryTooLong {
        /// Tokens of the input.
        len: usize,
        /// The limit.
        max: usize,
    },
    /// The beam width is zero, negative or over the limit.
    #[error("beam width {width} is not between 1 and {max}")]
    BeamWidth {
        /// The width asked for.
        width: i64,
        /// The engine's limit.
        max: usize,
    },
    /// The number of results is zero or negative.
    #[error("top_k {top_k} is not at least 1")]
    TopK {
        /// The number asked for.
        top_k: i64,
    },
    /// A field of a request has a value that it cannot have.
    #[error("{field}: {reason}")]
    InvalidField {
        /// The field's name.
        field: &'static str,
        /// What is wrong with it and what would be right.
        reason: String,
    },
    /// An option of a command, an engine, a writer or a quantiser has a value that it cannot have.
    #[error("{option}: {reason}")]
    InvalidOption {
        /// The flag (`--beams`) or the field (`context_tokens`).
        option: &'static str,
        /// What is wrong with it and what would be right.
        reason: String,
    },
    /// A request or a batch has more of something than any may have.
    #[error("{len} {what} are given, at most {max} are possible; split them up")]
    LimitExceeded {
        /// Of what: `candidates`, `groups`, ...
        what: &'static str,
        /// How many there are.
        len: usize,
        /// The limit.
        max: usize,
    },
    /// A request line is not a JSON object of the documented form.
    #[error("malformed request: {reason}")]
    MalformedRequest {
        /// The parser's words, with the column.
        reason: String,
    },
    /// One change of a batch cannot be; none of them happened.
    #[error("change {index} of the batch cannot be: {reason}; nothing was changed")]
    InvalidChange {
        /// Its place in the batch, from zero.
        index: usize,
        /// What is wrong with it.
        reason: String,
    },
    /// A request needs more of something than the engine has, even alone.
    #[error(
        "the request needs {needs} {what}, the engine was opened for {limit}; ask for less, or open the engine with more"
    )]
    TooLarge {
        /// Of what.
        what: &'static str,
        /// How much.
        needs: usize,
        /// How much there is.
        limit: usize,
    },
    /// Something that this version does not do.
    #[error("{what} is not supported by this version of Sidereal; {way_out}")]
    Unsupported {
        /// What was asked.
        what: String,
        /// What to do instead.
        way_out: String,
    },

    // Nobody's: try again later, or elsewhere.
    /// Too many requests wait already, or for too long.
    #[error(
        "the queue is full: {queued} requests wait, of at most {limit}, and a new one would for about {wait_ms} ms; try again in {retry_after_ms} ms, or send it elsewhere"
    )]
    Overloaded {
        /// Requests that wait.
        queued: usize,
        /// How many may.
        limit: usize,
        /// How long a new request would wait, as predicted.
        wait_ms: u64,
        /// When there will be room, as predicted.
        retry_after_ms: u64,
    },
    /// A compaction is under way, and the changes that wait for its end are as many as may.
    #[error("{backlog} changes wait for the end of a compaction, {limit} may; try again later")]
    WriterBusy {
        /// Changes that wait.
        backlog: usize,
        /// How many may.
        limit: usize,
    },
    /// The request's deadline went by, or would have before its answer was there.
    #[error("the answer could not be there within its deadline of {deadline_ms} ms{}", retry(*retry_after_ms))]
    DeadlineExceeded {
        /// The deadline, from the moment when the request was handed over.
        deadline_ms: f64,
        /// Where the engine refused it because of what waited and ran before it: when it would have
        /// been in time, as predicted.
        retry_after_ms: Option<u64>,
    },
    /// A request asks for a newer state of the catalog than the engine has.
    #[error(
        "the catalog is at snapshot {snapshot}, the request asks for {min_snapshot} or a later one; try again when the catalog has caught up, or ask another replica"
    )]
    CatalogBehind {
        /// The number of the engine's snapshot.
        snapshot: u64,
        /// The least that the request accepts.
        min_snapshot: u64,
    },
    /// The request was cancelled before its answer was there.
    #[error("the request was cancelled")]
    Cancelled,
    /// No requests are taken any more.
    #[error("the service is shutting down; no request is taken any more")]
    ShuttingDown,
    /// A call that waits for the engine was made on the engine's own thread, by a callback.
    #[error(
        "a callback waits for the engine that called it, which would never end; submit with a callback there, or wait on another thread"
    )]
    CalledFromCallback,
    /// The engine was opened by another process, which was then forked: its threads do not exist in
    /// the child.
    #[error("the engine was opened before this process was forked; open it in the child")]
    Forked,

    // The files': repair or replace them.
    /// The operating system could not open, read or write a file.
    #[error("{path}: {source}", path = path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// The operating system's error.
        source: Arc<std::io::Error>,
    },
    /// A file was written to while it was read, or while it is mapped and in use.
    #[error(
        "{path}: the file was changed in place while it is in use, and its contents cannot be trusted; open it again, and replace files by rename (mv), never by cp",
        path = path.display()
    )]
    FileChanged {
        /// The file.
        path: PathBuf,
    },
    /// A catalog file is not one, is of another version, or is damaged.
    #[error("{path}: {reason}; build it again with `sidereal catalog build`", path = path.display())]
    CatalogFile {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// A catalog holds what its checksums cover and nobody could have written.
    #[error("the catalog is not sound: {reason}; build it again with `sidereal catalog build`")]
    CatalogContents {
        /// What is wrong.
        reason: String,
    },
    /// A log of changes is damaged, or not the catalog's.
    #[error("{path}: {reason}", path = path.display())]
    ChangeLog {
        /// The file.
        path: PathBuf,
        /// What is wrong, and the way out.
        reason: String,
    },
    /// Another writer has the catalog open.
    #[error(
        "{path}: another writer has the catalog open; there can be one at a time: close it, or try again when it is done",
        path = path.display()
    )]
    CatalogInUse {
        /// The catalog.
        path: PathBuf,
    },
    /// The disk failed when a batch was to be forced to it. The batch is not applied.
    #[error(
        "{path}: {source}; the batch may be in the log all the same: open the catalog again, and if its snapshot is {snapshot} or later, the batch is there",
        path = path.display()
    )]
    MayBeLogged {
        /// The log.
        path: PathBuf,
        /// The snapshot that the batch would have made.
        snapshot: u64,
        /// The operating system's error.
        source: Arc<std::io::Error>,
    },
    /// A new base segment is older than the oldest changes of the log.
    #[error(
        "the new base would lose changes: {reason}, and the log begins after {oldest}; build a newer one, and give its watermarks with `catalog build --watermark`"
    )]
    StaleBase {
        /// The watermark before the first batch of the log.
        oldest: String,
        /// What the new base has of that partition.
        reason: String,
    },
    /// A file of items cannot be read.
    #[error("{path}: {place}: {reason}", path = path.display())]
    ItemsFile {
        /// The file.
        path: PathBuf,
        /// Line or item.
        place: String,
        /// What is wrong.
        reason: String,
    },
    /// A file of requests has a line that is no request for the command, or no request at all.
    #[error("{path}: {reason}", path = path.display())]
    RequestsFile {
        /// The file.
        path: PathBuf,
        /// The line, where it is one line's, and what is wrong.
        reason: String,
    },
    /// A file of output could not be made for another reason than the operating system's.
    #[error("{path}: {reason}", path = path.display())]
    OutputFile {
        /// The file.
        path: PathBuf,
        /// What went wrong.
        reason: String,
    },
    /// A model folder, or a catalog beside the model, is not there.
    #[error("{path}: {reason}", path = path.display())]
    ModelFolder {
        /// The folder.
        path: PathBuf,
        /// What is missing.
        reason: String,
    },
    /// A model folder's configuration is missing something or contradicts itself.
    #[error("{path}: {reason}", path = path.display())]
    ModelConfig {
        /// The file.
        path: PathBuf,
        /// What is wrong and what would be right.
        reason: String,
    },
    /// A weights file is damaged.
    #[error("{path}: {reason}; download or export the checkpoint again", path = path.display())]
    WeightsFile {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// The checkpoint lacks a tensor that its configuration asks for.
    #[error("the checkpoint has no tensor {name:?}, which its config.json calls for{hint}")]
    MissingTensor {
        /// The tensor's name.
        name: String,
        /// What is there instead, and the way out; may be empty.
        hint: String,
    },
    /// The checkpoint has a tensor that its configuration does not account for.
    #[error(
        "the checkpoint has a tensor {name:?} that its config.json does not account for; is it another architecture's? Where it changes no answer, list it in sidereal.json: \"ignore\": [{name:?}]"
    )]
    UnexpectedTensor {
        /// The tensor's name.
        name: String,
    },
    /// A tensor has another shape than the configuration says.
    #[error("tensor {name:?} has shape {found:?}, config.json calls for {expected:?}")]
    TensorShape {
        /// The tensor's name.
        name: String,
        /// The shape in the file.
        found: Vec<usize>,
        /// The shape by configuration.
        expected: Vec<usize>,
    },
    /// A weight is NaN or infinite.
    #[error(
        "tensor {name:?} holds a weight that is not finite, the first at index {index}; the checkpoint is broken, export it again"
    )]
    NonFiniteWeight {
        /// The tensor's name.
        name: String,
        /// Flat index of the first such weight.
        index: usize,
    },
    /// Finite weights give infinite scores or NaN whatever the input; they are not taken.
    #[error(
        "the network's scores are infinite or NaN for every input that was tried (step {step}), as its activations overflow f32; the weights were not taken, export the checkpoint again"
    )]
    NonFiniteModel {
        /// The decoding step of the last input tried, from zero.
        step: usize,
    },
    /// The model's levels and the catalog's do not go together.
    #[error("model and catalog do not go together: {reason}")]
    LevelsMismatch {
        /// Which level, and both numbers.
        reason: String,
    },

    // The device's or the model's arithmetic.
    /// The network's output is NaN or infinite for this input.
    #[error(
        "the model's scores are not finite for this request (step {step}): its activations, or its logits over the temperature, overflow f32"
    )]
    NonFiniteScores {
        /// The decoding step, from zero.
        step: usize,
    },
    /// The engine broke off in the middle of its work, and answers nothing any more.
    #[error("the engine has failed: {reason}; open it again")]
    EngineFailed {
        /// What happened.
        reason: String,
    },
    /// A device that this build or machine does not have.
    #[error("device {device:?}: {reason}")]
    Device {
        /// The device as asked for.
        device: String,
        /// Why not, and what is available.
        reason: String,
    },
}

impl Error {
    /// Wraps an error of the operating system with the file that it concerns.
    pub fn io(path: &Path, source: std::io::Error) -> Error {
        Error::Io { path: path.to_path_buf(), source: Arc::new(source) }
    }

    /// Who can put the error right.
    pub fn kind(&self) -> ErrorKind {
        self.kind_and_code().0
    }

    /// When a request that was refused for want of time or room may come again, as predicted; `None`
    /// where nothing is predicted.
    pub fn retry_after(&self) -> Option<Duration> {
        match *self {
            Error::Overloaded { retry_after_ms, .. } => Some(retry_after_ms),
            Error::DeadlineExceeded { retry_after_ms, .. } => retry_after_ms,
            _ => None,
        }
        .map(Duration::from_millis)
    }

    /// A short stable name, for programs: `unknown_item`, `history_too_long`, ...
    pub fn code(&self) -> &'static str {
        self.kind_and_code().1
    }
}

/// The way out of a deadline that could not be met.
fn retry(after_ms: Option<u64>) -> String {
    let after = after_ms.map(|ms| format!("; try again in {ms} ms, or send it elsewhere"));
    after.unwrap_or_default()
}

/// Makes the list of all codes and the match over all variants of one table: neither can lack one.
macro_rules! kinds_and_codes {
    ($($variant:ident: $kind:ident $code:literal,)*) => {
        /// The codes of all errors.
        pub(crate) const CODES: [&str; [$($code),*].len()] = [$($code),*];

        impl Error {
            fn kind_and_code(&self) -> (ErrorKind, &'static str) {
                match self {
                    $(Error::$variant { .. } => (ErrorKind::$kind, $code),)*
                }
            }
        }
    };
}

kinds_and_codes! {
    UnknownItem: Caller "unknown_item",
    EmptyInput: Caller "empty_input",
    TokenOutOfRange: Caller "token_out_of_range",
    HistoryTooLong: Caller "history_too_long",
    BeamWidth: Caller "beam_width",
    TopK: Caller "top_k",
    InvalidField: Caller "invalid_field",
    InvalidOption: Caller "invalid_option",
    LimitExceeded: Caller "limit_exceeded",
    MalformedRequest: Caller "malformed_request",
    InvalidChange: Caller "invalid_change",
    TooLarge: Caller "too_large",
    Unsupported: Caller "unsupported",
    Cancelled: Caller "cancelled",
    CalledFromCallback: Caller "called_from_callback",
    Forked: Caller "forked",
    Overloaded: Overloaded "overloaded",
    WriterBusy: Overloaded "writer_busy",
    DeadlineExceeded: Overloaded "deadline_exceeded",
    CatalogBehind: Overloaded "catalog_behind",
    ShuttingDown: Overloaded "shutting_down",
    Io: Files "io",
    FileChanged: Files "file_changed",
    CatalogFile: Files "catalog_file",
    CatalogContents: Files "catalog_contents",
    ChangeLog: Files "change_log",
    CatalogInUse: Files "catalog_in_use",
    MayBeLogged: Files "may_be_logged",
    StaleBase: Files "stale_base",
    ItemsFile: Files "items_file",
    RequestsFile: Files "requests_file",
    OutputFile: Files "output_file",
    ModelFolder: Files "model_folder",
    ModelConfig: Files "model_config",
    WeightsFile: Files "weights_file",
    MissingTensor: Files "missing_tensor",
    UnexpectedTensor: Files "unexpected_tensor",
    TensorShape: Files "tensor_shape",
    NonFiniteWeight: Files "non_finite_weight",
    NonFiniteModel: Files "non_finite_model",
    LevelsMismatch: Files "levels_mismatch",
    Device: Device "device",
    NonFiniteScores: Internal "non_finite_scores",
    EngineFailed: Internal "engine_failed",
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    /// One error of each variant, in the order of [`CODES`].
    fn one_of_each() -> Vec<Error> {
        let (path, reason) = (PathBuf::from("file"), String::from("why"));
        let (name, device) = (String::from("w"), String::from("cuda:0"));
        vec![
            Error::UnknownItem { field: "history", item: "x".into() },
            Error::EmptyInput,
            Error::TokenOutOfRange { token: 9, position: 1, vocab_size: 8 },
            Error::HistoryTooLong { len: 9, max: 8 },
            Error::BeamWidth { width: -1, max: 8 },
            Error::TopK { top_k: 0 },
            Error::InvalidField { field: "filter", reason: reason.clone() },
            Error::InvalidOption { option: "--beams", reason: reason.clone() },
            Error::LimitExceeded { what: "groups", len: 9, max: 8 },
            Error::MalformedRequest { reason: reason.clone() },
            Error::InvalidChange { index: 0, reason: reason.clone() },
            Error::TooLarge { what: "tokens", needs: 9, limit: 8 },
            Error::Unsupported { what: "this".into(), way_out: reason.clone() },
            Error::Cancelled,
            Error::CalledFromCallback,
            Error::Forked,
            Error::Overloaded { queued: 9, limit: 8, wait_ms: 30, retry_after_ms: 4 },
            Error::WriterBusy { backlog: 9, limit: 8 },
            Error::DeadlineExceeded { deadline_ms: 5.0, retry_after_ms: Some(3) },
            Error::CatalogBehind { snapshot: 3, min_snapshot: 4 },
            Error::ShuttingDown,
            Error::io(&path, std::io::ErrorKind::NotFound.into()),
            Error::FileChanged { path: path.clone() },
            Error::CatalogFile { path: path.clone(), reason: reason.clone() },
            Error::CatalogContents { reason: reason.clone() },
            Error::ChangeLog { path: path.clone(), reason: reason.clone() },
            Error::CatalogInUse { path: path.clone() },
            Error::MayBeLogged {
                path: path.clone(),
                snapshot: 3,
                source: Arc::new(std::io::ErrorKind::StorageFull.into()),
            },
            Error::StaleBase { oldest: "items/0@41".into(), reason: reason.clone() },
            Error::ItemsFile { path: path.clone(), place: "line 1".into(), reason: reason.clone() },
            Error::RequestsFile { path: path.clone(), reason: reason.clone() },
            Error::OutputFile { path: path.clone(), reason: reason.clone() },
            Error::ModelFolder { path: path.clone(), reason: reason.clone() },
            Error::ModelConfig { path: path.clone(), reason: reason.clone() },
            Error::WeightsFile { path, reason: reason.clone() },
            Error::MissingTensor { name: name.clone(), hint: String::new() },
            Error::UnexpectedTensor { name: name.clone() },
            Error::TensorShape { name: name.clone(), found: vec![1], expected: vec![2] },
            Error::NonFiniteWeight { name, index: 3 },
            Error::NonFiniteModel { step: 1 },
            Error::LevelsMismatch { reason: reason.clone() },
            Error::Device { device, reason: reason.clone() },
            Error::NonFiniteScores { step: 1 },
            Error::EngineFailed { reason },
        ]
    }

    #[test]
    fn every_error_has_a_kind_and_a_code_of_its_own() {
        let errors = one_of_each();
        let codes: Vec<&str> = errors.iter().map(Error::code).collect();
        assert_eq!(codes, CODES, "a new variant belongs here");
        assert_eq!(codes.iter().collect::<BTreeSet<_>>().len(), CODES.len(), "{codes:?}");
        let kinds: BTreeSet<&str> = errors.iter().map(|error| error.kind().name()).collect();
        assert_eq!(kinds, BTreeSet::from(["caller", "device", "files", "internal", "overloaded"]));
    }

    #[test]
    fn a_clone_of_an_error_says_and_is_what_its_original_is() {
        for error in one_of_each() {
            let clone = error.clone();
            assert_eq!(clone.to_string(), error.to_string());
            assert_eq!((clone.kind(), clone.code()), (error.kind(), error.code()));
            let source = |error: &Error| std::error::Error::source(error).map(|it| it.to_string());
            assert_eq!(source(&clone), source(&error));
        }
        let Error::Io { source, .. } =
            Error::io(Path::new("file"), std::io::ErrorKind::BrokenPipe.into()).clone()
        else {
            panic!("an error of the operating system stays one")
        };
        assert_eq!(source.kind(), std::io::ErrorKind::BrokenPipe);
    }
}
