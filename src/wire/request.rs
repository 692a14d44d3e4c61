//! Requests as JSON.

use std::time::Duration;

use serde::de::Error as _;
use serde::ser::SerializeStruct;
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use serde_json::{Map, Value};

use super::entries::{Entries, write_entries};
use super::loose::{LooseName, Real, Scalar, Whole};
use super::think::Thinking;
use super::tokens::{TokenName, named_tokens, tokens_in_range};
use crate::error::{Error, Result};
use crate::features::Features;
use crate::json;
use crate::request::{
    Forced, Input, LongHistory, MAX_BEAMS, Priority, Request, SharedSid, UnknownItems,
    per_sid_below_one,
};
use crate::search::{Constraint, Normalization, PhraseRule};

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
///
/// A null is the same as leaving the field out. Numbers and names are read in every notation that
/// means the same; other fields and other types than the documented ones are errors.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RequestLine {
    /// Echoed in the answer; any JSON value.
    #[serde(default)]
    pub id: Option<Value>,
    // The other names are those of published data sets.
    #[serde(default, alias = "items", alias = "item_ids", alias = "item_id_list")]
    history: Option<Entries>,
    #[serde(default)]
    time: Option<Whole>,
    #[serde(default)]
    features: Option<Map<String, Value>>,
    #[serde(default)]
    tokens: Option<Vec<Whole>>,
    #[serde(default)]
    text: Option<String>,
    #[serde(default)]
    messages: Option<Vec<Map<String, Value>>>,
    #[serde(default)]
    variables: Option<Map<String, Value>>,
    #[serde(default)]
    special_tokens: Option<bool>,
    #[serde(default)]
    unknown_items: Option<UnknownItems>,
    #[serde(default)]
    long_history: Option<LongHistory>,
    #[serde(default, deserialize_with = "names")]
    exclude: Option<Vec<String>>,
    #[serde(default)]
    exclude_history: Option<bool>,
    #[serde(default, deserialize_with = "names")]
    only: Option<Vec<String>>,
    #[serde(default)]
    filter: Option<String>,
    #[serde(default)]
    groups: Option<Vec<String>>,
    #[serde(default)]
    candidates: Option<Entries>,
    #[serde(default)]
    forced: Option<ForcedTokens>,
    #[serde(default)]
    read: Option<Vec<TokenName>>,
    #[serde(default)]
    think: Option<Thinking>,
    #[serde(default, deserialize_with = "seed")]
    seed: Option<u64>,
    #[serde(default)]
    log_probs: Option<bool>,
    #[serde(default)]
    sequences: Option<bool>,
    #[serde(default)]
    titles: Option<bool>,
    #[serde(default)]
    timings: Option<bool>,
    #[serde(default)]
    beams: Option<Beams>,
    #[serde(default)]
    top_k: Option<Whole>,
    #[serde(default)]
    normalize: Option<Normalization>,
    #[serde(default)]
    constraint: Option<Constraint>,
    #[serde(default)]
    phrase_rule: Option<PhraseRule>,
    #[serde(default)]
    temperature: Option<Real>,
    #[serde(default)]
    shared_sid: Option<SharedSid>,
    #[serde(default)]
    per_sid: Option<Whole>,
    #[serde(default, alias = "user_id")]
    user: Option<Scalar>,
    #[serde(default)]
    priority: Option<Priority>,
    #[serde(default)]
    deadline_ms: Option<Real>,
    #[serde(default)]
    min_snapshot: Option<Whole>,
    #[serde(default)]
    target: Option<LooseName>,
    #[serde(default)]
    segment: Option<Scalar>,
}

/// Tokens before the codes, and whether they are part of the scores.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
struct ForcedTokens {
    tokens: Vec<Whole>,
    #[serde(default)]
    counted: bool,
}

/// One width, or one for each level.
#[derive(Debug, Clone, Deserialize)]
#[serde(try_from = "Value")]
enum Beams {
    One(Whole),
    ByLevel(Vec<Whole>),
}

impl TryFrom<Value> for Beams {
    type Error = String;

    fn try_from(value: Value) -> std::result::Result<Beams, String> {
        let beams = match value.is_array() {
            true => Vec::deserialize(&value).map(Beams::ByLevel),
            false => Whole::deserialize(&value).map(Beams::One),
        };
        beams.map_err(|_| format!("beams: {value} is not a width, or a list of one for each level"))
    }
}

fn names<'de, D: Deserializer<'de>>(
    deserializer: D,
) -> std::result::Result<Option<Vec<String>>, D::Error> {
    let names = Option::<Vec<LooseName>>::deserialize(deserializer)?;
    Ok(names.map(|names| names.into_iter().map(|name| name.0).collect()))
}

fn seed<'de, D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Option<u64>, D::Error> {
    let seed = Option::<Whole>::deserialize(deserializer)?;
    let checked = seed.map(|Whole(seed)| {
        let out_of_range =
            |_| D::Error::custom(format!("seed: {seed} is not between 0 and 2^64 - 1"));
        u64::try_from(seed).map_err(out_of_range)
    });
    checked.transpose()
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
    /// Whether items of the history stay out of searches that have one.
    pub exclude_history: bool,
    /// Items of one semantic ID; `None` for all. A line's `shared_sid` replaces it too.
    pub per_sid: Option<usize>,
    /// Whether items come with their titles.
    pub titles: bool,
    /// What becomes of unknown items.
    pub unknown_items: UnknownItems,
    /// What becomes of histories that are too long.
    pub long_history: LongHistory,
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
            exclude_history: request.exclude_history,
            per_sid: request.per_sid,
            titles: request.titles,
            unknown_items: request.unknown_items,
            long_history: request.long_history,
        }
    }
}

impl RequestDefaults {
    /// Refuses once what would fail for every line that takes these defaults.
    ///
    /// # Errors
    /// [`Error::InvalidOption`] for a number of widths that is not that of the catalog's levels.
    pub fn check(&self, num_levels: usize) -> Result<()> {
        let given = self.widths.len();
        match given == 0 || given == num_levels {
            true => Ok(()),
            false => Err(Error::InvalidOption {
                option: "--beams",
                reason: format!(
                    "{given} widths are given, the catalog has {num_levels} levels; give one width, \
                     or one for each level"
                ),
            }),
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
            let form = "a request is a JSON object, {\"history\": [...], ...}";
            let table = json::table(line).map(|table| format!("{table}; "));
            return Err(malformed(table.unwrap_or_default() + form));
        }
        json::parse(line).map_err(|reason| malformed(with_own_name(&reason)))
    }

    /// Reads the fields of one object.
    ///
    /// # Errors
    /// [`Error::MalformedRequest`] with the parser's words.
    pub fn from_fields(fields: Map<String, Value>) -> Result<RequestLine> {
        json::from_value(Value::Object(fields))
            .map_err(|reason| Error::MalformedRequest { reason: with_own_name(&reason) })
    }

    /// The items of the history, empty where the line gives tokens.
    pub fn history(&self) -> &[String] {
        self.history.as_ref().map_or(&[], |history| &history.items)
    }

    /// The items to score, where the line names some.
    pub fn candidates(&self) -> Option<&[String]> {
        self.candidates.as_ref().map(|candidates| &candidates.items[..])
    }

    /// The item that the user took next, where the line says so: evaluation needs it.
    pub fn target(&self) -> Option<&str> {
        self.target.as_ref().map(|name| &*name.0)
    }

    /// The part of the requests that the line belongs to, where it says so: evaluation tells them apart.
    pub fn segment(&self) -> Option<&str> {
        self.segment.as_ref().map(|name| &*name.0)
    }

    /// The one input that the line gives. A program that writes every field writes empty ones beside
    /// the one that it means.
    fn input(&self) -> Result<Input> {
        let history = self.history.as_ref().map(|Entries { items, .. }| {
            let input = Ok(Input::History(items.clone()));
            (items.is_empty(), input)
        });
        let tokens = self.tokens.as_ref().map(|tokens| {
            let input = tokens_in_range("tokens", tokens).map(Input::Tokens);
            (tokens.is_empty(), input)
        });
        let text = self.text.as_ref().map(|text| {
            let input = Ok(Input::Text(text.clone()));
            (text.is_empty(), input)
        });
        let messages = self.messages.as_ref().map(|messages| {
            let input = messages.iter().cloned().map(Value::Object).collect();
            (messages.is_empty(), Ok(Input::Messages(input)))
        });
        let given: Vec<_> = [history, tokens, text, messages].into_iter().flatten().collect();
        let mut meant = given.iter().filter(|(is_empty, _)| !is_empty);
        match (meant.next(), meant.next()) {
            (Some(_), Some(_)) => Err(Error::InvalidField {
                field: "tokens",
                reason:
                    "give one of \"history\", \"tokens\", \"text\" and \"messages\", not several"
                        .into(),
            }),
            (Some((_, input)), None) => input.clone(),
            (None, _) => {
                given.into_iter().next().map_or(Err(Error::EmptyInput), |(_, input)| input)
            }
        }
    }

    /// The request, with `defaults` where the line is silent.
    ///
    /// # Errors
    /// The caller's: a number out of range; none or several of `history`, `tokens`, `text` and
    /// `messages`.
    pub fn to_request(&self, defaults: &RequestDefaults) -> Result<Request> {
        let input = self.input()?;
        let top_k = match self.top_k {
            Some(Whole(top_k)) if top_k < 1 => return Err(Error::TopK { top_k: clamped(top_k) }),
            Some(Whole(top_k)) => usize::try_from(top_k).unwrap_or(usize::MAX),
            None => defaults.top_k,
        };
        let width = |Whole(width): Whole| {
            let out_of_range = |_| Error::BeamWidth { width: clamped(width), max: MAX_BEAMS };
            u32::try_from(width).map(|width| width as usize).map_err(out_of_range)
        };
        let (beams, widths) = match &self.beams {
            None => (defaults.beams, defaults.widths.clone()),
            Some(Beams::One(beams)) => (width(*beams)?, Vec::new()),
            Some(Beams::ByLevel(widths)) => {
                let widths: Vec<usize> = widths.iter().map(|&w| width(w)).collect::<Result<_>>()?;
                (widths.last().copied().unwrap_or(0), widths)
            }
        };
        let deadline = self.deadline_ms.map(|Real(ms)| {
            Duration::try_from_secs_f64(ms / 1e3).map_err(|_| Error::InvalidField {
                field: "deadline_ms",
                reason: format!("{ms} is not a number of milliseconds"),
            })
        });
        Ok(Request {
            unknown_items: self.unknown_items.unwrap_or(defaults.unknown_items),
            long_history: self.long_history.unwrap_or(defaults.long_history),
            exclude: self.exclude.clone().unwrap_or_default(),
            exclude_history: self.exclude_history.unwrap_or_else(|| {
                defaults.exclude_history && matches!(input, Input::History(_)) && self.searches()
            }),
            input,
            only: self.only.clone(),
            filter: self.filter.clone(),
            groups: self.groups.clone().unwrap_or_default(),
            candidates: self.candidates().unwrap_or_default().to_vec(),
            features: self.features()?,
            forced: self.forced()?,
            read: named_tokens("read", self.read.as_deref().unwrap_or_default())?,
            think: self.think.as_ref().map(Thinking::to_think).transpose()?,
            seed: self.seed,
            log_probs: self.log_probs.unwrap_or(false),
            sequences: self.sequences.unwrap_or(false),
            titles: self.titles.unwrap_or(defaults.titles),
            timings: self.timings.unwrap_or(false),
            beams,
            widths,
            top_k,
            normalization: self.normalize.or(defaults.normalization),
            constraint: self.constraint.unwrap_or(defaults.constraint),
            phrase_rule: self.phrase_rule,
            temperature: self.temperature.map_or(1.0, |Real(temperature)| temperature as f32),
            shared_sid: self.shared_sid.unwrap_or_default(),
            per_sid: self.per_sid(defaults)?,
            variables: self.variables.clone().unwrap_or_default(),
            special_tokens: self.special_tokens,
            user: self.user.as_ref().map(|user| user.0.clone()).filter(|user| !user.is_empty()),
            priority: self.priority.unwrap_or_default(),
            deadline: deadline.transpose()?,
            min_snapshot: self.min_snapshot()?,
        })
    }

    /// Whether the line asks for items that are found rather than scored or read.
    fn searches(&self) -> bool {
        let is_empty = |list: Option<usize>| list.unwrap_or(0) == 0;
        let reads = !is_empty(self.read.as_ref().map(Vec::len));
        let has_groups = !is_empty(self.groups.as_ref().map(Vec::len));
        is_empty(self.candidates().map(<[String]>::len)) && (!reads || has_groups)
    }

    fn per_sid(&self, defaults: &RequestDefaults) -> Result<Option<usize>> {
        match (self.per_sid, self.shared_sid) {
            (Some(Whole(most)), _) if most < 0 => Err(per_sid_below_one(clamped(most))),
            (Some(Whole(most)), _) => Ok(Some(usize::try_from(most).unwrap_or(usize::MAX))),
            (None, Some(_)) => Ok(None),
            (None, None) => Ok(defaults.per_sid),
        }
    }

    fn features(&self) -> Result<Features> {
        let of_entries = |entries: &Option<Entries>| {
            entries.as_ref().map(|entries| entries.features.clone()).unwrap_or_default()
        };
        let seconds = |Whole(time)| {
            i64::try_from(time).map_err(|_| Error::InvalidField {
                field: "time",
                reason: format!("{time} is no number of seconds that 64 bits hold"),
            })
        };
        Ok(Features {
            time: self.time.map(seconds).transpose()?,
            context: self.features.clone().unwrap_or_default(),
            history: of_entries(&self.history),
            candidates: of_entries(&self.candidates),
        })
    }

    fn min_snapshot(&self) -> Result<Option<u64>> {
        let number = |Whole(number)| {
            u64::try_from(number).map_err(|_| Error::InvalidField {
                field: "min_snapshot",
                reason: format!("{number} is not the number of a snapshot"),
            })
        };
        self.min_snapshot.map(number).transpose()
    }

    fn forced(&self) -> Result<Option<Forced>> {
        let Some(forced) = &self.forced else { return Ok(None) };
        if forced.tokens.is_empty() {
            let reason = "has no tokens; give at least one, or leave the field out".into();
            return Err(Error::InvalidField { field: "forced", reason });
        }
        let tokens = tokens_in_range("forced", &forced.tokens)?;
        Ok(Some(Forced { tokens, is_counted: forced.counted }))
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

fn clamped(number: i128) -> i64 {
    number.clamp(i64::MIN.into(), i64::MAX.into()) as i64
}

/// The line that says the whole request, whatever a reader's defaults are.
impl Serialize for Request {
    fn serialize<S: Serializer>(&self, serializer: S) -> std::result::Result<S::Ok, S::Error> {
        let mut line = serializer.serialize_struct("Request", 28)?;
        match &self.input {
            Input::History(items) => {
                write_entries(&mut line, "history", items, &self.features.history)?;
            }
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
        for (field, texts) in [("exclude", &self.exclude), ("groups", &self.groups)] {
            if !texts.is_empty() {
                line.serialize_field(field, texts)?;
            }
        }
        write_features(&mut line, self)?;
        line.serialize_field("exclude_history", &self.exclude_history)?;
        line.serialize_field("unknown_items", &self.unknown_items)?;
        line.serialize_field("long_history", &self.long_history)?;
        if let Some(only) = &self.only {
            line.serialize_field("only", only)?;
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
        if let Some(think) = &self.think {
            line.serialize_field("think", think)?;
        }
        if let Some(seed) = self.seed {
            line.serialize_field("seed", &seed)?;
        }
        line.serialize_field("log_probs", &self.log_probs)?;
        line.serialize_field("sequences", &self.sequences)?;
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
        if let Some(rule) = &self.phrase_rule {
            line.serialize_field("phrase_rule", rule)?;
        }
        line.serialize_field("temperature", &self.temperature)?;
        line.serialize_field("shared_sid", &self.shared_sid)?;
        if let Some(per_sid) = self.per_sid {
            line.serialize_field("per_sid", &per_sid)?;
        }
        line.serialize_field("priority", &self.priority)?;
        if let Some(deadline) = self.deadline {
            line.serialize_field("deadline_ms", &(deadline.as_nanos() as f64 / 1e6))?;
        }
        if let Some(min_snapshot) = self.min_snapshot {
            line.serialize_field("min_snapshot", &min_snapshot)?;
        }
        line.end()
    }
}

/// Candidates, and what is known beside the items.
fn write_features<S: SerializeStruct>(
    line: &mut S,
    request: &Request,
) -> std::result::Result<(), S::Error> {
    let features = &request.features;
    if !request.candidates.is_empty() {
        write_entries(line, "candidates", &request.candidates, &features.candidates)?;
    }
    if let Some(time) = features.time {
        line.serialize_field("time", &time)?;
    }
    if !features.context.is_empty() {
        line.serialize_field("features", &features.context)?;
    }
    Ok(())
}

impl Serialize for Forced {
    fn serialize<S: Serializer>(&self, serializer: S) -> std::result::Result<S::Ok, S::Error> {
        let mut forced = serializer.serialize_struct("Forced", 2)?;
        forced.serialize_field("tokens", &self.tokens)?;
        forced.serialize_field("counted", &self.is_counted)?;
        forced.end()
    }
}
