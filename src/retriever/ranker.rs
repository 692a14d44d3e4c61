//! The door of networks that score candidates: a history and candidates in, scores by task out.

use std::collections::{HashMap, HashSet};
use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use rayon::{ThreadPool, ThreadPoolBuilder};
use serde::Deserialize;
use serde_json::{Map, Value};

use super::item_rows::ItemRows;
use super::scorer::{Score, Scorer};
use crate::answer::{
    Answer, Recommendation, TaskScore, Timings, UnknownByField, UnknownNames, shortened,
};
use crate::backend::Backend;
use crate::catalog::{Catalog, Snapshot};
use crate::device::{Device, WithBackend};
use crate::engine::{Known, check_snapshot};
use crate::error::{Error, Result};
use crate::features;
use crate::json;
use crate::models::config::Config;
use crate::models::weights::Weights;
use crate::models::{
    SCORE_FAMILIES, ScoreRequest, ScoredItem, Task, load_scores, scores_candidates,
};
use crate::recommender_options::RecommenderOptions;
use crate::request::{Input, MAX_BEAMS, Request, UnknownItems};
use crate::service::AnswersWhole;

/// A network that scores candidates and a catalog, for any number of callers.
///
/// A request names its candidates; the history is read once for all of them. Each item of the answer has
/// one score a task ([`Recommendation::tasks`]), and they come in the order of the first task's, which
/// is their `score`.
///
/// ```no_run
/// use std::{path::Path, sync::Arc};
/// use sidereal::{Ranker, RecommenderOptions, catalog::Catalog, wire::RequestLine};
///
/// # fn main() -> sidereal::Result<()> {
/// let folder = Path::new("models/dlrm_hstu/small");
/// let catalog = Arc::new(Catalog::open(&folder.join("items.jsonl"))?);
/// let ranker = Ranker::open(folder, catalog, &RecommenderOptions::new("cpu"))?;
/// let line = r#"{"history": [{"item": "17", "time": 1700000000, "action": 3}],
///                "candidates": ["4", "9"], "time": 1700000100, "features": {"user_id": 7}}"#;
/// let request = RequestLine::parse(line)?.to_request(&Default::default())?;
/// for found in &ranker.recommend(&request)?.items {
///     println!("{} {:?}", found.item, found.tasks);
/// }
/// # Ok(())
/// # }
/// ```
pub struct Ranker {
    scorer: Box<dyn Score>,
    /// Where the folder says which row of the item table an item is; otherwise names are numbers.
    rows: Option<ItemRows>,
    /// By name: what the folder says of items.
    known: HashMap<String, Map<String, Value>>,
    tasks: Vec<Arc<str>>,
    catalog: Arc<Catalog>,
    pool: ThreadPool,
}

/// What is read of a folder before its network is put on a device.
struct Open<'a> {
    folder: &'a Path,
    config: Config,
    weights: Weights,
    catalog: Arc<Catalog>,
    num_threads: usize,
}

impl Open<'_> {
    fn read<'a>(
        folder: &'a Path,
        catalog: Arc<Catalog>,
        options: &RecommenderOptions,
    ) -> Result<Open<'a>> {
        options.engine.check()?;
        let path = folder.join("sidereal.json");
        if !path.exists() {
            return Err(Error::ModelFolder {
                path: folder.to_path_buf(),
                reason: format!(
                    "sidereal.json is missing: it names the \"family\" of a network that scores \
                     candidates ({}) and what its tensors do not tell",
                    SCORE_FAMILIES.join(", ")
                ),
            });
        }
        let (config, weights) = (Config::read(&path)?, Weights::open(folder)?);
        Ok(Open { folder, config, weights, catalog, num_threads: options.engine.threads })
    }
}

impl WithBackend for Open<'_> {
    type Output = Ranker;

    fn run<B: Backend>(self, backend: B) -> Result<Ranker> {
        let Open { folder, config, weights, catalog, num_threads } = self;
        let model = load_scores(&backend, &config, weights)?;
        let scorer = Box::new(Scorer::new(backend, model)?);
        let names = config.text("items").map(|name| folder.join(name));
        let names = names.unwrap_or_else(|| folder.join("item_rows.json"));
        let rows = match names.exists() || config.text("items").is_some() {
            true => Some(ItemRows::read(&names, scorer.spec().num_items, false)?),
            false => None,
        };
        let tasks = scorer.spec().tasks.iter().map(|task| task.name.as_str().into()).collect();
        let known = read_known(&folder.join("item_features.jsonl"))?;
        Ok(Ranker { scorer, rows, known, tasks, catalog, pool: new_pool(num_threads)? })
    }
}

/// Threads that compute.
pub(super) fn new_pool(num_threads: usize) -> Result<ThreadPool> {
    let name = |index: usize| format!("sidereal-{index}");
    let pool = ThreadPoolBuilder::new().num_threads(num_threads).thread_name(name).build();
    pool.map_err(|error| Error::Device { device: "cpu".into(), reason: error.to_string() })
}

/// A line of `item_features.jsonl`.
#[derive(Deserialize)]
struct KnownItem {
    item: String,
    #[serde(flatten)]
    features: Map<String, Value>,
}

impl Ranker {
    /// Whether a folder's `sidereal.json` names a family that scores candidates.
    ///
    /// # Errors
    /// The file's, where it is there.
    pub fn serves(folder: &Path) -> Result<bool> {
        scores_candidates(folder)
    }

    /// Opens a folder, to score the items of a catalog. Of the options it takes `device`, `dtype` and
    /// the engine's `threads`.
    ///
    /// # Errors
    /// The files': see [`load_scores`]; [`Error::ModelFolder`];
    /// [`Error::Device`], [`Error::InvalidOption`].
    pub fn open(
        folder: &Path,
        catalog: Arc<Catalog>,
        options: &RecommenderOptions,
    ) -> Result<Ranker> {
        let open = Open::read(folder, catalog, options)?;
        let device: Device = options.device.parse()?;
        let dtype = options.dtype.unwrap_or_else(|| device.default_dtype(open.weights.dtype()));
        device.with_backend(Some(dtype), open)
    }

    /// The same, on a device that the caller has opened.
    ///
    /// # Errors
    /// Those of [`open`](Ranker::open).
    pub fn open_on<B: Backend>(
        backend: B,
        folder: &Path,
        catalog: Arc<Catalog>,
        options: &RecommenderOptions,
    ) -> Result<Ranker> {
        Open::read(folder, catalog, options)?.run(backend)
    }

    /// The catalog whose items are scored.
    pub fn catalog(&self) -> &Arc<Catalog> {
        &self.catalog
    }

    /// What the network says of a candidate, in the order of its scores.
    pub fn tasks(&self) -> &[Task] {
        &self.scorer.spec().tasks
    }

    /// Items of a history that the network reads at most.
    pub fn max_items(&self) -> usize {
        self.scorer.spec().max_items
    }

    /// What computes, as `x86_64 f32x16`.
    pub fn description(&self) -> String {
        self.scorer.description()
    }

    /// Threads that compute.
    pub fn num_threads(&self) -> usize {
        self.pool.current_num_threads()
    }

    /// Answers one request, which names its candidates.
    ///
    /// # Errors
    /// The request's; [`Error::FileChanged`].
    pub fn recommend(&self, request: &Request) -> Result<Answer> {
        let start = Instant::now();
        let snapshot = self.catalog.checked_snapshot()?;
        check_snapshot(request, &snapshot)?;
        check_fields(request)?;
        let mut unknown_items = UnknownByField::default();
        let (history, num_cut, unknown) = self.history(request)?;
        unknown_items.history = unknown;
        let (items, candidates) = self.candidates(request, &snapshot, &mut unknown_items)?;
        let scored = ScoreRequest {
            history,
            candidates,
            context: Some(&request.features.context),
            time: request.features.time,
        };
        let scores = match items.is_empty() {
            true => Vec::new(),
            false => self.pool.install(|| self.scorer.score(&scored))?,
        };
        snapshot.check_file()?;
        let tokens = scored.history.len();
        let mut scored: Vec<(u32, &[f32])> =
            items.into_iter().zip(scores.chunks_exact(self.tasks.len())).collect();
        scored.sort_by(|a, b| b.1[0].total_cmp(&a.1[0]).then(a.0.cmp(&b.0)));
        let recommend = |(item, scores): (u32, &[f32])| {
            let mut found = Recommendation::new(&snapshot, item, scores[0], request.titles);
            let of_task =
                |(task, &score): (&Arc<str>, &f32)| TaskScore { task: Arc::clone(task), score };
            found.tasks = self.tasks.iter().zip(scores).map(of_task).collect();
            found
        };
        let items = scored.into_iter().map(recommend).collect();
        let total_us = u64::try_from(start.elapsed().as_micros()).unwrap_or(u64::MAX);
        let timings = request.timings.then(|| Timings { total_us, ..Timings::default() });
        Ok(Answer {
            items,
            groups: Vec::new(),
            read: Vec::new(),
            thoughts: Vec::new(),
            sequences: Vec::new(),
            tokens,
            cached_tokens: 0,
            skipped_items: num_cut,
            weights_version: 1,
            timings,
            unknown_items,
            snapshot,
        })
    }

    /// An item's number, where it has one.
    fn number(&self, name: &str) -> Option<i64> {
        match &self.rows {
            Some(rows) => rows.find(name).map(i64::from),
            None => name.parse().ok(),
        }
    }

    fn scored<'a>(
        &'a self,
        name: &str,
        features: Option<&'a Map<String, Value>>,
    ) -> Option<ScoredItem<'a>> {
        Some(ScoredItem { number: self.number(name)?, features, known: self.known.get(name) })
    }

    /// A request's history, how many items were cut off, and the names that have no number.
    fn history<'a>(
        &'a self,
        request: &'a Request,
    ) -> Result<(Vec<ScoredItem<'a>>, usize, UnknownNames)> {
        let Input::History(names) = &request.input else {
            let reason = "a network that scores candidates reads a \"history\" of items".into();
            return Err(Error::InvalidField { field: "tokens", reason });
        };
        let given = &request.features.history;
        features::check_len("history", given.len(), names.len())?;
        let num_cut = names.len().saturating_sub(self.max_items());
        let (mut history, mut unknown) = (Vec::new(), UnknownNames::default());
        for (at, name) in names.iter().enumerate().skip(num_cut) {
            match self.scored(name, given.get(at)) {
                Some(item) => history.push(item),
                None => unknown.push(name),
            }
        }
        match unknown.names.first() {
            Some(item) if request.unknown_items == UnknownItems::Error || history.is_empty() => {
                Err(Error::UnknownItem { field: "history", item: item.clone() })
            }
            _ => Ok((history, num_cut, unknown)),
        }
    }

    /// The available candidates, each once, by the catalog's numbers and by those of the network. Items
    /// without a number count as unknown.
    fn candidates<'a>(
        &'a self,
        request: &'a Request,
        snapshot: &Snapshot,
        unknown_items: &mut UnknownByField,
    ) -> Result<(Vec<u32>, Vec<ScoredItem<'a>>)> {
        let names = &request.candidates;
        if names.len() > MAX_BEAMS {
            let (len, max) = (names.len(), MAX_BEAMS);
            return Err(Error::LimitExceeded { what: "candidates", len, max });
        }
        let given = &request.features.candidates;
        features::check_len("candidates", given.len(), names.len())?;
        let known = Known::required("candidates", names, snapshot, request.unknown_items)?;
        unknown_items.candidates = known.unknown;
        let (mut items, mut candidates, mut seen) = (Vec::new(), Vec::new(), HashSet::new());
        for (at, name) in names.iter().enumerate() {
            let Some(item) = snapshot.find(name).filter(|&item| seen.insert(item)) else {
                continue;
            };
            match self.scored(name, given.get(at)) {
                None if request.unknown_items == UnknownItems::Error => {
                    return Err(Error::UnknownItem { field: "candidates", item: shortened(name) });
                }
                None => unknown_items.candidates.push(name),
                Some(_) if !snapshot.is_available(item) => {}
                Some(candidate) => {
                    items.push(item);
                    candidates.push(candidate);
                }
            }
        }
        Ok((items, candidates))
    }
}

/// What a folder says of its items, by name.
fn read_known(path: &Path) -> Result<HashMap<String, Map<String, Value>>> {
    let mut known = HashMap::new();
    if !path.exists() {
        return Ok(known);
    }
    let text = std::fs::read_to_string(path).map_err(|error| Error::io(path, error))?;
    for (number, line) in text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty()) {
        let bad = |reason: String| Error::ModelConfig {
            path: path.to_path_buf(),
            reason: format!("line {}: {reason}", number + 1),
        };
        let KnownItem { item, features } = json::parse(line).map_err(bad)?;
        known.insert(item, features);
    }
    Ok(known)
}

impl AnswersWhole for Ranker {
    fn catalog(&self) -> &Arc<Catalog> {
        &self.catalog
    }

    fn description(&self) -> String {
        Ranker::description(self)
    }

    fn num_threads(&self) -> usize {
        Ranker::num_threads(self)
    }

    fn max_items(&self) -> usize {
        Ranker::max_items(self)
    }

    fn check(&self, request: &Request) -> Result<()> {
        check_fields(request)
    }

    fn answer_all(&self, requests: &[Request]) -> Vec<Result<Answer>> {
        requests.iter().map(|request| self.recommend(request)).collect()
    }

    fn matrix_flops(&self) -> u64 {
        self.scorer.matrix_flops()
    }
}

/// Refuses what goes with searches alone, and a request without candidates.
fn check_fields(request: &Request) -> Result<()> {
    if request.candidates.is_empty() {
        let reason = "are missing: this network scores the items that a request names, as \
                      {\"candidates\": [\"4\", \"9\"]}";
        return Err(Error::InvalidField { field: "candidates", reason: reason.into() });
    }
    let of_searches = [
        ("forced", request.forced.is_some()),
        ("read", !request.read.is_empty()),
        ("think", request.think.is_some()),
        ("seed", request.seed.is_some()),
        ("log_probs", request.log_probs),
        ("sequences", request.sequences),
        ("filter", request.filter.is_some()),
        ("exclude", !request.exclude.is_empty()),
        ("exclude_history", request.exclude_history),
        ("only", request.only.is_some()),
        ("groups", !request.groups.is_empty()),
        ("phrase_rule", request.phrase_rule.is_some()),
        ("temperature", request.temperature != 1.0),
    ];
    match of_searches.into_iter().find(|(_, is_given)| *is_given) {
        Some((field, _)) => {
            let reason = "goes with a search; this network scores the candidates of a request";
            Err(Error::InvalidField { field, reason: reason.into() })
        }
        None => Ok(()),
    }
}
