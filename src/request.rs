//! What a caller asks for.

use std::time::Duration;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::error::Error;
use crate::features::Features;
use crate::search::{Constraint, Merge, Normalization, PhraseRule, Sampling};

/// The largest beam width that a request may ask for.
pub const MAX_BEAMS: usize = 4096;

/// Which items of a semantic ID an answer lists where several share it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum SharedSid {
    /// All allowed ones, in the catalog's order: by weight, then by name.
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

/// What becomes of names in a history or among candidates that the catalog does not have: items that
/// were deleted, that have not arrived yet, or that another replica knows.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum UnknownItems {
    /// They are left out, counted and listed in the answer. The request fails only where it names
    /// items and none of them is known.
    #[default]
    Skip,
    /// The first one fails the request.
    Error,
}

/// What becomes of a history whose tokens are more than model or engine take.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LongHistory {
    /// It fails the request.
    #[default]
    Error,
    /// As many of its newest items are read as fit.
    Cut,
}

/// The input of the model.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Input {
    /// The user's items, oldest first, by the catalog's names.
    History(Vec<String>),
    /// The model's input tokens, given as they are.
    Tokens(Vec<u32>),
    /// A text, which the model's tokenizer makes tokens of.
    Text(String),
    /// Messages, which the model's chat template makes a text of: objects with `role`, `content` and
    /// whatever else the template reads.
    Messages(Vec<Value>),
}

/// A token of the model's vocabulary, by number or by its text.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum NamedToken {
    /// Its number.
    Id(u32),
    /// Its text in the model folder's `tokenizer.json`: `"Yes"`.
    Text(String),
}

/// Tokens that the model is made to write before the codes.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Forced {
    /// In the order in which they are written; at least one.
    pub tokens: Vec<u32>,
    /// Whether their log-probabilities are part of every score.
    pub is_counted: bool,
}

impl Forced {
    /// Tokens that are part of no score.
    pub fn new(tokens: impl Into<Vec<u32>>) -> Forced {
        Forced { tokens: tokens.into(), is_counted: false }
    }

    /// Tokens whose log-probabilities are added to every score.
    pub fn counted(tokens: impl Into<Vec<u32>>) -> Forced {
        Forced { tokens: tokens.into(), is_counted: true }
    }
}

/// What a model is to write before it recommends, token by token, as it likes.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct Think {
    /// Tokens of the thought at most, without the stop token.
    pub max_tokens: usize,
    /// The tokens that end it. The model then goes on behind the first of them, whichever it was, and
    /// also where the thought has as many tokens as it may have. At least one, unless there are
    /// `stop_texts`.
    pub stop: Vec<NamedToken>,
    /// Texts that end it, in a folder that has a tokenizer. The tokens that complete such a text are
    /// part of the thought, and the model goes on behind them, without a stop token; the thought's text
    /// ends before it.
    pub stop_texts: Vec<String>,
    /// How each token is drawn.
    pub sampling: Sampling,
    /// Thoughts that are drawn from one input, each followed by a search of its own: 1 to 64. The
    /// first is that of a request of one branch.
    pub branches: usize,
    /// How the branches' results become one.
    pub merge: Merge,
}

impl Think {
    /// One thought that is drawn from the model's own distribution.
    pub fn new(max_tokens: usize, stop: impl IntoIterator<Item = NamedToken>) -> Think {
        let stop = stop.into_iter().collect();
        Think {
            max_tokens,
            stop,
            stop_texts: Vec::new(),
            sampling: Sampling::default(),
            branches: 1,
            merge: Merge::default(),
        }
    }

    /// Sets [`sampling`](Think::sampling).
    #[must_use]
    pub fn with_sampling(mut self, sampling: Sampling) -> Think {
        self.sampling = sampling;
        self
    }

    /// Sets [`stop_texts`](Think::stop_texts).
    #[must_use]
    pub fn with_stop_texts(mut self, texts: impl IntoIterator<Item = impl Into<String>>) -> Think {
        self.stop_texts = texts.into_iter().map(Into::into).collect();
        self
    }

    /// Sets [`branches`](Think::branches) and [`merge`](Think::merge).
    #[must_use]
    pub fn with_branches(mut self, branches: usize, merge: Merge) -> Think {
        (self.branches, self.merge) = (branches, merge);
        self
    }
}

/// One request for recommendations.
///
/// ```
/// use std::time::Duration;
/// use sidereal::Request;
///
/// let request = Request::from_history(["168", "278"])
///     .with_exclude(["168"])
///     .with_filter("tag:garden & !tag:adult")
///     .with_beams(128)
///     .with_deadline(Duration::from_millis(100));
/// assert_eq!(request.beams, 128);
/// ```
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct Request {
    /// The input of the model.
    pub input: Input,
    /// What becomes of names in the history and among the candidates that the catalog does not have.
    ///
    /// A history is cut to the model's `max_items` first and looked up then, so that only names count
    /// that would be read.
    pub unknown_items: UnknownItems,
    /// What becomes of a history that is longer than model or engine take.
    pub long_history: LongHistory,
    /// Items that must not come back. Names that the catalog does not have are ignored, because
    /// an unknown item cannot be recommended.
    pub exclude: Vec<String>,
    /// Whether the items of the history must not come back either. Needs a history.
    pub exclude_history: bool,
    /// The only items that may come back, beside what `filter`, `groups` and `exclude` say; `None`
    /// for all. Names that the catalog does not have are ignored and counted in the answer; an empty
    /// list allows nothing, and the answer is empty.
    pub only: Option<Vec<String>>,
    /// Only items that pass come back: tags, combined ([`Filter`](crate::catalog::filter::Filter)),
    /// as `tag:garden & !tag:adult`. Where none passes the answer is empty.
    pub filter: Option<String>,
    /// Further filters, each for a search of its own with `beams` and `top_k` of its own, all in
    /// one context: the best of each of several categories. Empty for one search.
    pub groups: Vec<String>,
    /// Items to score instead of searching: the answer lists them all, best first, with the score
    /// that each would have in a search. Those that are not available are left out. `beams` and
    /// `top_k` have no effect. Empty for a search.
    pub candidates: Vec<String>,
    /// Tokens that the model is made to write before the codes of every item, and before `read`.
    /// `None` takes the model's own (`forced` in its `sidereal.json`), which stand before codes
    /// alone.
    ///
    /// Tokens that do not count extend the context of a decoder-only model, where the prefix cache
    /// finds them; all others are steps of the search. Counted ones add their log-probabilities over
    /// the vocabulary, and nothing where scores are normalised over less.
    pub forced: Option<Forced>,
    /// Tokens whose log-probabilities the answer gives, over the whole vocabulary, right after the
    /// input and the request's `forced` tokens. Empty for none.
    ///
    /// They replace the search, unless the request names `groups` or `candidates`: then both are
    /// answered from one context. Fields that belong to a search (`filter`, `exclude`, `exclude_history`, `only`,
    /// `seed`, `log_probs`) are refused without one; `beams` and `top_k` have no effect then.
    pub read: Vec<NamedToken>,
    /// What the model writes first: a thought, until a stop token. `forced`, `read` and the search follow
    /// it; its tokens are part of no score. The answer has its text. `groups`, `seed` and `log_probs`
    /// are refused beside it, and `read` beside several branches.
    pub think: Option<Think>,
    /// Draws the beams instead of keeping the best, without replacement and with the probabilities
    /// of the legal continuations (Kool et al. 2019); equal seeds draw equal beams. Items come in
    /// the order drawn; their scores are those of a search without a seed.
    pub seed: Option<u64>,
    /// Whether each item of the answer has the log-probabilities of its tokens.
    pub log_probs: bool,
    /// Whether the answer lists what every beam of the search wrote, be it an item or not. Refused
    /// beside `groups`, and beside several branches of a thought.
    pub sequences: bool,
    /// Whether each item of the answer has its title, where the catalog knows one.
    pub titles: bool,
    /// Whether the answer has the times that its phases took.
    pub timings: bool,
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
    /// How phrases are searched, by a model that writes phrases instead of semantic IDs. `None` takes
    /// the model's own (`phrases` in its `sidereal.json`).
    pub phrase_rule: Option<PhraseRule>,
    /// Divides the logits before normalisation; above 0, 1 by default.
    pub temperature: f32,
    /// Which items of a shared semantic ID come back.
    pub shared_sid: SharedSid,
    /// How many items of one semantic ID come back at most: the first allowed ones. `None` for no
    /// limit. [`SharedSid::First`] is a limit of one, and the smaller of two limits holds. It has
    /// no effect on `candidates`, which are all listed.
    pub per_sid: Option<usize>,
    /// What the model's prompt or chat template may name: `{"query": "...", "enable_thinking": false}`.
    pub variables: Map<String, Value>,
    /// What is known beside the items, for networks that read times, ratings and the like.
    pub features: Features,
    /// Whether a text has the tokens that the tokenizer puts around every text; `None` for yes with
    /// [`Input::Text`], and for no with [`Input::Messages`], whose template writes them itself.
    pub special_tokens: Option<bool>,
    /// Any name for the user. A user who returns with a longer history finds the context of the
    /// earlier one in the prefix cache; answers do not depend on it.
    pub user: Option<String>,
    /// The request's place among those that wait.
    pub priority: Priority,
    /// Time budget, from submission. Past it the request is answered with
    /// [`Error::DeadlineExceeded`](crate::Error::DeadlineExceeded).
    pub deadline: Option<Duration>,
    /// The oldest state of the catalog that may answer: the number that
    /// [`CatalogWriter::apply`](crate::CatalogWriter::apply) returned or an answer's snapshot has,
    /// so that a caller reads its own writes wherever the request goes. Where the catalog is behind,
    /// the request is refused at once with
    /// [`Error::CatalogBehind`](crate::Error::CatalogBehind). Numbers compare among copies of
    /// one catalog file and its log. `None` for the newest state that is there.
    pub min_snapshot: Option<u64>,
}

impl Request {
    /// A request with the defaults: 50 beams, 10 results, trie constraint.
    pub fn new(input: Input) -> Request {
        Request {
            input,
            unknown_items: UnknownItems::Skip,
            long_history: LongHistory::Error,
            exclude: Vec::new(),
            exclude_history: false,
            only: None,
            filter: None,
            groups: Vec::new(),
            candidates: Vec::new(),
            forced: None,
            read: Vec::new(),
            think: None,
            seed: None,
            log_probs: false,
            sequences: false,
            titles: false,
            timings: false,
            beams: 50,
            widths: Vec::new(),
            top_k: 10,
            normalization: None,
            constraint: Constraint::Trie,
            phrase_rule: None,
            temperature: 1.0,
            shared_sid: SharedSid::All,
            per_sid: None,
            variables: Map::new(),
            features: Features::default(),
            special_tokens: None,
            user: None,
            priority: Priority::Normal,
            deadline: None,
            min_snapshot: None,
        }
    }

    /// A request by the items of a history, oldest first.
    pub fn from_history<S: Into<String>>(items: impl IntoIterator<Item = S>) -> Request {
        Request::new(Input::History(texts(items)))
    }

    /// A request by the model's input tokens.
    pub fn from_tokens(tokens: impl Into<Vec<u32>>) -> Request {
        Request::new(Input::Tokens(tokens.into()))
    }

    /// A request by a text.
    pub fn from_text(text: impl Into<String>) -> Request {
        Request::new(Input::Text(text.into()))
    }

    /// A request by messages, each an object with `role` and `content`.
    pub fn from_messages(messages: impl Into<Vec<Value>>) -> Request {
        Request::new(Input::Messages(messages.into()))
    }
}

/// Setters in builder style, one for each field.
impl Request {
    /// Sets [`exclude`](Request::exclude).
    #[must_use]
    pub fn with_exclude<S: Into<String>>(mut self, items: impl IntoIterator<Item = S>) -> Request {
        self.exclude = texts(items);
        self
    }

    /// Sets [`exclude_history`](Request::exclude_history).
    #[must_use]
    pub fn with_exclude_history(mut self, exclude_history: bool) -> Request {
        self.exclude_history = exclude_history;
        self
    }

    /// Sets [`unknown_items`](Request::unknown_items).
    #[must_use]
    pub fn with_unknown_items(mut self, unknown_items: UnknownItems) -> Request {
        self.unknown_items = unknown_items;
        self
    }

    /// Sets [`long_history`](Request::long_history).
    #[must_use]
    pub fn with_long_history(mut self, long_history: LongHistory) -> Request {
        self.long_history = long_history;
        self
    }

    /// Sets [`only`](Request::only).
    #[must_use]
    pub fn with_only<S: Into<String>>(mut self, items: impl IntoIterator<Item = S>) -> Request {
        self.only = Some(texts(items));
        self
    }

    /// Sets [`filter`](Request::filter).
    #[must_use]
    pub fn with_filter(mut self, filter: impl Into<String>) -> Request {
        self.filter = Some(filter.into());
        self
    }

    /// Sets [`groups`](Request::groups).
    #[must_use]
    pub fn with_groups<S: Into<String>>(mut self, filters: impl IntoIterator<Item = S>) -> Request {
        self.groups = texts(filters);
        self
    }

    /// Sets [`candidates`](Request::candidates).
    #[must_use]
    pub fn with_candidates<S: Into<String>>(
        mut self,
        items: impl IntoIterator<Item = S>,
    ) -> Request {
        self.candidates = texts(items);
        self
    }

    /// Sets [`forced`](Request::forced).
    #[must_use]
    pub fn with_forced(mut self, forced: Forced) -> Request {
        self.forced = Some(forced);
        self
    }

    /// Sets [`read`](Request::read).
    #[must_use]
    pub fn with_read(mut self, tokens: impl IntoIterator<Item = NamedToken>) -> Request {
        self.read = tokens.into_iter().collect();
        self
    }

    /// Sets [`think`](Request::think).
    #[must_use]
    pub fn with_think(mut self, think: Think) -> Request {
        self.think = Some(think);
        self
    }

    /// Sets [`seed`](Request::seed).
    #[must_use]
    pub fn with_seed(mut self, seed: u64) -> Request {
        self.seed = Some(seed);
        self
    }

    /// Sets [`log_probs`](Request::log_probs).
    #[must_use]
    pub fn with_log_probs(mut self, is_wanted: bool) -> Request {
        self.log_probs = is_wanted;
        self
    }

    /// Sets [`sequences`](Request::sequences).
    #[must_use]
    pub fn with_sequences(mut self, sequences: bool) -> Request {
        self.sequences = sequences;
        self
    }

    /// Sets [`titles`](Request::titles).
    #[must_use]
    pub fn with_titles(mut self, is_wanted: bool) -> Request {
        self.titles = is_wanted;
        self
    }

    /// Sets [`timings`](Request::timings).
    #[must_use]
    pub fn with_timings(mut self, is_wanted: bool) -> Request {
        self.timings = is_wanted;
        self
    }

    /// Sets [`beams`](Request::beams), one width for all levels.
    #[must_use]
    pub fn with_beams(mut self, beams: usize) -> Request {
        (self.beams, self.widths) = (beams, Vec::new());
        self
    }

    /// Sets [`widths`](Request::widths), one for each level, and `beams` to the last of them.
    #[must_use]
    pub fn with_widths(mut self, widths: impl Into<Vec<usize>>) -> Request {
        self.widths = widths.into();
        self.beams = self.widths.last().copied().unwrap_or(self.beams);
        self
    }

    /// Sets [`top_k`](Request::top_k).
    #[must_use]
    pub fn with_top_k(mut self, top_k: usize) -> Request {
        self.top_k = top_k;
        self
    }

    /// Sets [`normalization`](Request::normalization).
    #[must_use]
    pub fn with_normalization(mut self, normalization: Normalization) -> Request {
        self.normalization = Some(normalization);
        self
    }

    /// Sets [`constraint`](Request::constraint).
    #[must_use]
    pub fn with_constraint(mut self, constraint: Constraint) -> Request {
        self.constraint = constraint;
        self
    }

    /// Sets [`phrase_rule`](Request::phrase_rule).
    #[must_use]
    pub fn with_phrase_rule(mut self, rule: PhraseRule) -> Request {
        self.phrase_rule = Some(rule);
        self
    }

    /// Sets [`temperature`](Request::temperature).
    #[must_use]
    pub fn with_temperature(mut self, temperature: f32) -> Request {
        self.temperature = temperature;
        self
    }

    /// Sets [`shared_sid`](Request::shared_sid).
    #[must_use]
    pub fn with_shared_sid(mut self, shared_sid: SharedSid) -> Request {
        self.shared_sid = shared_sid;
        self
    }

    /// Sets [`per_sid`](Request::per_sid).
    #[must_use]
    pub fn with_per_sid(mut self, per_sid: usize) -> Request {
        self.per_sid = Some(per_sid);
        self
    }

    /// Sets [`variables`](Request::variables).
    #[must_use]
    pub fn with_variables(mut self, variables: Map<String, Value>) -> Request {
        self.variables = variables;
        self
    }

    /// Sets [`features`](Request::features).
    #[must_use]
    pub fn with_features(mut self, features: Features) -> Request {
        self.features = features;
        self
    }

    /// Sets [`special_tokens`](Request::special_tokens).
    #[must_use]
    pub fn with_special_tokens(mut self, are_wanted: bool) -> Request {
        self.special_tokens = Some(are_wanted);
        self
    }

    /// Sets [`user`](Request::user).
    #[must_use]
    pub fn with_user(mut self, user: impl Into<String>) -> Request {
        self.user = Some(user.into());
        self
    }

    /// Sets [`priority`](Request::priority).
    #[must_use]
    pub fn with_priority(mut self, priority: Priority) -> Request {
        self.priority = priority;
        self
    }

    /// Sets [`deadline`](Request::deadline).
    #[must_use]
    pub fn with_deadline(mut self, deadline: Duration) -> Request {
        self.deadline = Some(deadline);
        self
    }

    /// Sets [`min_snapshot`](Request::min_snapshot).
    #[must_use]
    pub fn with_min_snapshot(mut self, snapshot: u64) -> Request {
        self.min_snapshot = Some(snapshot);
        self
    }
}

/// The error of a limit under which no item of a semantic ID comes back.
pub(crate) fn per_sid_below_one(per_sid: i64) -> Error {
    let reason = format!("{per_sid} is not at least 1; leave the field out for no limit");
    Error::InvalidField { field: "per_sid", reason }
}

fn texts<S: Into<String>>(texts: impl IntoIterator<Item = S>) -> Vec<String> {
    texts.into_iter().map(Into::into).collect()
}
