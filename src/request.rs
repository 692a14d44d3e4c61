//! What a caller asks and what comes back.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::search::{Constraint, Normalization};

/// The largest beam width that a request may ask for.
pub const MAX_BEAMS: usize = 4096;

/// Which items of a semantic ID an answer lists where several share it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum SharedSid {
    /// All allowed ones, in the catalog's order.
    #[default]
    All,
    /// The first allowed one.
    First,
}

/// Which requests go first. One that has waited long enough goes before all that came after it.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize,
)]
#[serde(rename_all = "lowercase")]
pub enum Priority {
    /// Before the others.
    High,
    /// The usual.
    #[default]
    Normal,
    /// What nobody waits for.
    Low,
}

/// What the model reads.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Input {
    /// The user's items, oldest first, by the catalog's names.
    History(Vec<String>),
    /// The model's input tokens, given as they are.
    Tokens(Vec<u32>),
}

/// One request for recommendations.
#[derive(Debug, Clone, PartialEq)]
pub struct Request {
    /// What the model reads.
    pub input: Input,
    /// Items that must not come back. Names that the catalog does not have are ignored:
    /// what is not there cannot be recommended.
    pub exclude: Vec<String>,
    /// Only items that pass come back: tags, combined ([`Filter`](crate::catalog::filter::Filter)),
    /// as `tag:garden & !tag:adult`. Where none passes the answer is empty.
    pub filter: Option<String>,
    /// Further filters, each for a search of its own with `beams` and `top_k` of its own, all in
    /// one context: the best of each of several categories. Empty for one search.
    pub each: Vec<String>,
    /// Items to score instead of searching: the answer lists them all, best first, with the score
    /// that each would have in a search. Those that are not available are left out. `beams` and
    /// `top_k` are not looked at. Empty for a search.
    pub candidates: Vec<String>,
    /// Draws the beams instead of keeping the best, without replacement and with the probabilities
    /// of the legal continuations (Kool et al. 2019); equal seeds draw the same. Items come in the
    /// order drawn; their scores are what they would be without.
    pub sample: Option<u64>,
    /// Whether each item of the answer has the log-probabilities of its tokens.
    pub log_probs: bool,
    /// The beam width: how many prefixes are kept at each level.
    pub beams: usize,
    /// Where the levels differ: the width at each level, in order. Empty for `beams` at all.
    pub widths: Vec<usize>,
    /// How many items come back at most.
    pub top_k: usize,
    /// `None` takes the model's default (`normalize` in its `sidereal.json`, else `Vocabulary`).
    pub normalization: Option<Normalization>,
    /// What may follow a prefix.
    pub constraint: Constraint,
    /// Divides the logits before normalisation; above 0, 1 by default.
    pub temperature: f32,
    /// Which items of a shared semantic ID come back.
    pub shared_sid: SharedSid,
    /// Who asks, by any name. A user who returns with a longer history finds the context of the
    /// earlier one; answers do not depend on it.
    pub user: Option<String>,
    /// Who goes first where many wait.
    pub priority: Priority,
    /// How long the answer is of use, from the moment when the request is handed over. Later it is
    /// answered with [`Error::DeadlineExceeded`].
    pub deadline: Option<Duration>,
}

impl Request {
    /// A request with the defaults: 50 beams, 10 results, trie constraint.
    pub fn new(input: Input) -> Request {
        Request {
            input,
            exclude: Vec::new(),
            filter: None,
            each: Vec::new(),
            candidates: Vec::new(),
            sample: None,
            log_probs: false,
            beams: 50,
            widths: Vec::new(),
            top_k: 10,
            normalization: None,
            constraint: Constraint::Trie,
            temperature: 1.0,
            shared_sid: SharedSid::All,
            user: None,
            priority: Priority::Normal,
            deadline: None,
        }
    }

    /// A request by the items of a history, oldest first.
    pub fn from_history<S: Into<String>>(items: impl IntoIterator<Item = S>) -> Request {
        Request::new(Input::History(items.into_iter().map(Into::into).collect()))
    }

    /// A request by the model's input tokens.
    pub fn from_tokens(tokens: impl Into<Vec<u32>>) -> Request {
        Request::new(Input::Tokens(tokens.into()))
    }
}

/// An item's name in a file: a JSON string or whole number.
#[derive(Deserialize)]
#[serde(untagged, expecting = "expected an item's name, a text or a whole number")]
pub(crate) enum Name {
    Text(String),
    Number(u64),
}

impl From<Name> for String {
    fn from(name: Name) -> String {
        match name {
            Name::Text(text) => text,
            Name::Number(number) => number.to_string(),
        }
    }
}

/// One line of a requests file, before defaults are filled in.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RequestLine {
    /// Echoed in the answer; a string or a number.
    #[serde(default)]
    pub id: Option<serde_json::Value>,
    #[serde(default, deserialize_with = "names")]
    history: Option<Vec<String>>,
    #[serde(default)]
    tokens: Option<Vec<i64>>,
    #[serde(default, deserialize_with = "names")]
    exclude: Option<Vec<String>>,
    #[serde(default)]
    filter: Option<String>,
    #[serde(default)]
    each: Option<Vec<String>>,
    #[serde(default, deserialize_with = "names")]
    candidates: Option<Vec<String>>,
    #[serde(default)]
    sample: Option<u64>,
    #[serde(default)]
    log_probs: Option<bool>,
    #[serde(default)]
    beams: Option<Beams>,
    #[serde(default)]
    top_k: Option<i64>,
    #[serde(default)]
    normalize: Option<Normalization>,
    #[serde(default)]
    constraint: Option<Constraint>,
    #[serde(default)]
    temperature: Option<f32>,
    #[serde(default)]
    shared_sid: Option<SharedSid>,
    #[serde(default, deserialize_with = "name")]
    user: Option<String>,
    #[serde(default)]
    priority: Option<Priority>,
    #[serde(default)]
    deadline_ms: Option<f64>,
    #[serde(default, deserialize_with = "name")]
    target: Option<String>,
}

/// One width, or one for each level.
#[derive(Debug, Clone, Deserialize)]
#[serde(try_from = "serde_json::Value")]
enum Beams {
    One(i64),
    ByLevel(Vec<i64>),
}

impl TryFrom<serde_json::Value> for Beams {
    type Error = String;

    fn try_from(value: serde_json::Value) -> std::result::Result<Beams, String> {
        let one = value.as_i64().map(Beams::One);
        let by_level = || {
            let widths = value.as_array()?.iter().map(serde_json::Value::as_i64);
            widths.collect::<Option<Vec<i64>>>().map(Beams::ByLevel)
        };
        one.or_else(by_level).ok_or_else(|| {
            format!("beams: {value} is not a width, or a list of one for each level")
        })
    }
}

fn names<'de, D: serde::Deserializer<'de>>(
    deserializer: D,
) -> std::result::Result<Option<Vec<String>>, D::Error> {
    let names = Option::<Vec<Name>>::deserialize(deserializer)?;
    Ok(names.map(|names| names.into_iter().map(String::from).collect()))
}

fn name<'de, D: serde::Deserializer<'de>>(
    deserializer: D,
) -> std::result::Result<Option<String>, D::Error> {
    Ok(Option::<Name>::deserialize(deserializer)?.map(String::from))
}

/// What a caller wants where a line is silent.
#[derive(Debug, Clone)]
pub struct RequestDefaults {
    /// Beam width.
    pub beams: usize,
    /// Beam widths by level, where they differ.
    pub widths: Vec<usize>,
    /// Results.
    pub top_k: usize,
    /// Normalisation; `None` for the model's default.
    pub normalization: Option<Normalization>,
    /// Constraint.
    pub constraint: Constraint,
}

impl Default for RequestDefaults {
    fn default() -> RequestDefaults {
        let request = Request::new(Input::Tokens(Vec::new()));
        RequestDefaults {
            beams: request.beams,
            widths: request.widths,
            top_k: request.top_k,
            normalization: request.normalization,
            constraint: request.constraint,
        }
    }
}

impl RequestLine {
    /// Reads one line of JSON.
    ///
    /// # Errors
    /// [`Error::MalformedRequest`] with the parser's words.
    pub fn parse(line: &str) -> Result<RequestLine> {
        let malformed = |reason: String| Error::MalformedRequest { reason };
        if !line.trim_start().starts_with('{') {
            return Err(malformed("a request is a JSON object, {\"history\": [...], ...}".into()));
        }
        serde_json::from_str(line).map_err(|error| malformed(error.to_string()))
    }

    /// The items of the history, empty where the line gives tokens.
    pub fn history(&self) -> &[String] {
        self.history.as_deref().unwrap_or_default()
    }

    /// The items to score, where the line names some.
    pub fn candidates(&self) -> Option<&[String]> {
        self.candidates.as_deref()
    }

    /// The filters of the groups, empty where the line asks for one list.
    pub fn each(&self) -> &[String] {
        self.each.as_deref().unwrap_or_default()
    }

    /// The item that the user took next, where the line says so: evaluation needs it.
    pub fn target(&self) -> Option<&str> {
        self.target.as_deref()
    }

    /// The request, with `defaults` where the line is silent.
    ///
    /// # Errors
    /// The caller's: a number out of range, both or neither of `history` and `tokens`.
    pub fn to_request(&self, defaults: &RequestDefaults) -> Result<Request> {
        let input = match (&self.history, &self.tokens) {
            (Some(_), Some(_)) => {
                return Err(Error::InvalidField {
                    field: "tokens",
                    reason: "give either \"history\" or \"tokens\", not both".into(),
                });
            }
            (Some(items), None) => Input::History(items.clone()),
            (None, Some(tokens)) => Input::Tokens(tokens_in_range(tokens)?),
            (None, None) => return Err(Error::EmptyInput),
        };
        let top_k = self.top_k.unwrap_or(defaults.top_k as i64);
        let width = |width: i64| {
            usize::try_from(width).map_err(|_| Error::BeamWidth { width, max: MAX_BEAMS })
        };
        let (beams, widths) = match &self.beams {
            None => (defaults.beams, defaults.widths.clone()),
            Some(Beams::One(beams)) => (width(*beams)?, Vec::new()),
            Some(Beams::ByLevel(widths)) => {
                let widths: Vec<usize> = widths.iter().map(|&w| width(w)).collect::<Result<_>>()?;
                (widths.last().copied().unwrap_or(0), widths)
            }
        };
        let deadline = self.deadline_ms.map(|ms| {
            Duration::try_from_secs_f64(ms / 1e3).map_err(|_| Error::InvalidField {
                field: "deadline_ms",
                reason: format!("{ms} is not a number of milliseconds"),
            })
        });
        Ok(Request {
            input,
            exclude: self.exclude.clone().unwrap_or_default(),
            filter: self.filter.clone(),
            each: self.each.clone().unwrap_or_default(),
            candidates: self.candidates.clone().unwrap_or_default(),
            sample: self.sample,
            log_probs: self.log_probs.unwrap_or(false),
            beams,
            widths,
            top_k: usize::try_from(top_k).map_err(|_| Error::TopK { top_k })?,
            normalization: self.normalize.or(defaults.normalization),
            constraint: self.constraint.unwrap_or(defaults.constraint),
            temperature: self.temperature.unwrap_or(1.0),
            shared_sid: self.shared_sid.unwrap_or_default(),
            user: self.user.clone(),
            priority: self.priority.unwrap_or_default(),
            deadline: deadline.transpose()?,
        })
    }
}

fn tokens_in_range(tokens: &[i64]) -> Result<Vec<u32>> {
    let convert = |(position, &token): (usize, &i64)| {
        u32::try_from(token).map_err(|_| Error::InvalidField {
            field: "tokens",
            reason: format!("{token} at position {position} is not a token"),
        })
    };
    tokens.iter().enumerate().map(convert).collect()
}
