//! Requests as JSON.

use std::time::Duration;

use serde::ser::SerializeStruct;
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use serde_json::{Map, Value};

use super::name::Name;
use crate::error::{Error, Result};
use crate::request::{Forced, Input, MAX_BEAMS, NamedToken, Priority, Request, SharedSid};
use crate::search::{Constraint, Normalization};

/// Fields that are looked for under other names, and their own.
const OTHER_NAMES: [(&str, &str); 6] = [
    ("prompt", "text"),
    ("each", "groups"),
    ("sample", "seed"),
    ("k", "top_k"),
    ("beam_width", "beams"),
    ("normalization", "normalize"),
];

/// One request as JSON, before defaults are filled in: a line of a requests file, or a body.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RequestLine {
    /// Echoed in the answer; a string or a number.
    #[serde(default)]
    pub id: Option<Value>,
    // The other names are those of published data sets.
    #[serde(
        default,
        deserialize_with = "names",
        alias = "items",
        alias = "item_ids",
        alias = "item_id_list"
    )]
    history: Option<Vec<String>>,
    #[serde(default)]
    tokens: Option<Vec<i64>>,
    #[serde(default)]
    text: Option<String>,
    #[serde(default)]
    messages: Option<Vec<Map<String, Value>>>,
    #[serde(default)]
    variables: Option<Map<String, Value>>,
    #[serde(default)]
    special_tokens: Option<bool>,
    #[serde(default, deserialize_with = "names")]
    exclude: Option<Vec<String>>,
    #[serde(default)]
    filter: Option<String>,
    #[serde(default)]
    groups: Option<Vec<String>>,
    #[serde(default, deserialize_with = "names")]
    candidates: Option<Vec<String>>,
    #[serde(default)]
    forced: Option<ForcedTokens>,
    #[serde(default)]
    read: Option<Vec<TokenName>>,
    #[serde(default)]
    seed: Option<u64>,
    #[serde(default)]
    log_probs: Option<bool>,
    #[serde(default)]
    titles: Option<bool>,
    #[serde(default)]
    timings: Option<bool>,
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
    #[serde(default, deserialize_with = "optional_name", alias = "user_id")]
    user: Option<String>,
    #[serde(default)]
    priority: Option<Priority>,
    #[serde(default)]
    deadline_ms: Option<f64>,
    #[serde(default, deserialize_with = "optional_name")]
    target: Option<String>,
}

/// Tokens before the codes, and whether they are part of the scores.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
struct ForcedTokens {
    tokens: Vec<i64>,
    #[serde(default)]
    counted: bool,
}

/// A token by its text or its number.
#[derive(Debug, Clone, Deserialize)]
#[serde(untagged, expecting = "expected a token, its text or its number")]
enum TokenName {
    Text(String),
    Id(i64),
}

/// One width, or one for each level.
#[derive(Debug, Clone, Deserialize)]
#[serde(try_from = "Value")]
enum Beams {
    One(i64),
    ByLevel(Vec<i64>),
}

impl TryFrom<Value> for Beams {
    type Error = String;

    fn try_from(value: Value) -> std::result::Result<Beams, String> {
        let one = value.as_i64().map(Beams::One);
        let by_level = || {
            let widths = value.as_array()?.iter().map(Value::as_i64);
            widths.collect::<Option<Vec<i64>>>().map(Beams::ByLevel)
        };
        one.or_else(by_level).ok_or_else(|| {
            format!("beams: {value} is not a width, or a list of one for each level")
        })
    }
}

fn names<'de, D: Deserializer<'de>>(
    deserializer: D,
) -> std::result::Result<Option<Vec<String>>, D::Error> {
    let names = Option::<Vec<Name>>::deserialize(deserializer)?;
    Ok(names.map(|names| names.into_iter().map(String::from).collect()))
}

fn optional_name<'de, D: Deserializer<'de>>(
    deserializer: D,
) -> std::result::Result<Option<String>, D::Error> {
    Ok(Option::<Name>::deserialize(deserializer)?.map(String::from))
}

/// The values of fields that a line leaves out.
#[derive(Debug, Clone)]
#[non_exhaustive]
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
    /// Whether items come with their titles.
    pub titles: bool,
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
            titles: request.titles,
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
        serde_json::from_str(line).map_err(|error| malformed(with_own_name(&error.to_string())))
    }

    /// The items of the history, empty where the line gives tokens.
    pub fn history(&self) -> &[String] {
        self.history.as_deref().unwrap_or_default()
    }

    /// The items to score, where the line names some.
    pub fn candidates(&self) -> Option<&[String]> {
        self.candidates.as_deref()
    }

    /// The item that the user took next, where the line says so: evaluation needs it.
    pub fn target(&self) -> Option<&str> {
        self.target.as_deref()
    }

    /// The one input that the line gives.
    fn input(&self) -> Result<Input> {
        let history = self.history.as_ref().map(|items| Ok(Input::History(items.clone())));
        let tokens = self.tokens.as_ref();
        let tokens = tokens.map(|tokens| Ok(Input::Tokens(tokens_in_range("tokens", tokens)?)));
        let text = self.text.as_ref().map(|text| Ok(Input::Text(text.clone())));
        let messages = self.messages.as_ref().map(|messages| {
            Ok(Input::Messages(messages.iter().cloned().map(Value::Object).collect()))
        });
        let mut inputs = [history, tokens, text, messages].into_iter().flatten();
        match (inputs.next(), inputs.next()) {
            (None, _) => Err(Error::EmptyInput),
            (Some(input), None) => input,
            (Some(_), Some(_)) => Err(Error::InvalidField {
                field: "tokens",
                reason:
                    "give one of \"history\", \"tokens\", \"text\" and \"messages\", not several"
                        .into(),
            }),
        }
    }

    /// The request, with `defaults` where the line is silent.
    ///
    /// # Errors
    /// The caller's: a number out of range; none or several of `history`, `tokens`, `text` and
    /// `messages`.
    pub fn to_request(&self, defaults: &RequestDefaults) -> Result<Request> {
        let input = self.input()?;
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
        let forced = self.forced.as_ref().map(|forced| match forced.tokens.is_empty() {
            true => Err(Error::InvalidField {
                field: "forced",
                reason: "has no tokens; give at least one, or leave the field out".into(),
            }),
            false => Ok(Forced {
                tokens: tokens_in_range("forced", &forced.tokens)?,
                is_counted: forced.counted,
            }),
        });
        let read = self.read.iter().flatten().enumerate().map(|(position, name)| match name {
            TokenName::Text(text) => Ok(NamedToken::Text(text.clone())),
            TokenName::Id(token) => Ok(NamedToken::Id(in_range("read", position, *token)?)),
        });
        Ok(Request {
            input,
            exclude: self.exclude.clone().unwrap_or_default(),
            filter: self.filter.clone(),
            groups: self.groups.clone().unwrap_or_default(),
            candidates: self.candidates.clone().unwrap_or_default(),
            forced: forced.transpose()?,
            read: read.collect::<Result<_>>()?,
            seed: self.seed,
            log_probs: self.log_probs.unwrap_or(false),
            titles: self.titles.unwrap_or(defaults.titles),
            timings: self.timings.unwrap_or(false),
            beams,
            widths,
            top_k: usize::try_from(top_k).map_err(|_| Error::TopK { top_k })?,
            normalization: self.normalize.or(defaults.normalization),
            constraint: self.constraint.unwrap_or(defaults.constraint),
            temperature: self.temperature.unwrap_or(1.0),
            shared_sid: self.shared_sid.unwrap_or_default(),
            variables: self.variables.clone().unwrap_or_default(),
            special_tokens: self.special_tokens,
            user: self.user.clone(),
            priority: self.priority.unwrap_or_default(),
            deadline: deadline.transpose()?,
        })
    }
}

/// The parser's words, with the right name where a field has another.
fn with_own_name(error: &str) -> String {
    let unknown = error.strip_prefix("unknown field `").and_then(|rest| rest.split_once('`'));
    let own = unknown.and_then(|(name, _)| OTHER_NAMES.iter().find(|(other, _)| *other == name));
    match own {
        Some((_, own)) => format!("{error}; did you mean `{own}`?"),
        None => error.to_string(),
    }
}

fn tokens_in_range(field: &'static str, tokens: &[i64]) -> Result<Vec<u32>> {
    let tokens = tokens.iter().enumerate();
    tokens.map(|(position, &token)| in_range(field, position, token)).collect()
}

fn in_range(field: &'static str, position: usize, token: i64) -> Result<u32> {
    u32::try_from(token).map_err(|_| Error::InvalidField {
        field,
        reason: format!("{token} at position {position} is not a token"),
    })
}

/// The line that says the whole request, whatever a reader's defaults are.
impl Serialize for Request {
    fn serialize<S: Serializer>(&self, serializer: S) -> std::result::Result<S::Ok, S::Error> {
        let mut line = serializer.serialize_struct("Request", 22)?;
        match &self.input {
            Input::History(items) => line.serialize_field("history", items)?,
            Input::Tokens(tokens) => line.serialize_field("tokens", tokens)?,
            Input::Text(text) => line.serialize_field("text", text)?,
            Input::Messages(messages) => line.serialize_field("messages", messages)?,
        }
        if !self.variables.is_empty() {
            line.serialize_field("variables", &self.variables)?;
        }
        if let Some(special_tokens) = self.special_tokens {
            line.serialize_field("special_tokens", &special_tokens)?;
        }
        for (field, texts) in
            [("exclude", &self.exclude), ("groups", &self.groups), ("candidates", &self.candidates)]
        {
            if !texts.is_empty() {
                line.serialize_field(field, texts)?;
            }
        }
        for (field, text) in [("filter", &self.filter), ("user", &self.user)] {
            if let Some(text) = text {
                line.serialize_field(field, text)?;
            }
        }
        if let Some(forced) = &self.forced {
            line.serialize_field("forced", forced)?;
        }
        if !self.read.is_empty() {
            line.serialize_field("read", &self.read)?;
        }
        if let Some(seed) = self.seed {
            line.serialize_field("seed", &seed)?;
        }
        line.serialize_field("log_probs", &self.log_probs)?;
        line.serialize_field("titles", &self.titles)?;
        line.serialize_field("timings", &self.timings)?;
        match self.widths.is_empty() {
            true => line.serialize_field("beams", &self.beams)?,
            false => line.serialize_field("beams", &self.widths)?,
        }
        line.serialize_field("top_k", &self.top_k)?;
        if let Some(normalization) = self.normalization {
            line.serialize_field("normalize", &normalization)?;
        }
        line.serialize_field("constraint", &self.constraint)?;
        line.serialize_field("temperature", &self.temperature)?;
        line.serialize_field("shared_sid", &self.shared_sid)?;
        line.serialize_field("priority", &self.priority)?;
        if let Some(deadline) = self.deadline {
            line.serialize_field("deadline_ms", &(deadline.as_nanos() as f64 / 1e6))?;
        }
        line.end()
    }
}

impl Serialize for Forced {
    fn serialize<S: Serializer>(&self, serializer: S) -> std::result::Result<S::Ok, S::Error> {
        let mut forced = serializer.serialize_struct("Forced", 2)?;
        forced.serialize_field("tokens", &self.tokens)?;
        forced.serialize_field("counted", &self.is_counted)?;
        forced.end()
    }
}

impl Serialize for NamedToken {
    fn serialize<S: Serializer>(&self, serializer: S) -> std::result::Result<S::Ok, S::Error> {
        match self {
            NamedToken::Id(token) => serializer.serialize_u32(*token),
            NamedToken::Text(text) => serializer.serialize_str(text),
        }
    }
}
