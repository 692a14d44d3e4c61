//! The door: a folder, a catalog, requests in, answers out.

use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use rayon::ThreadPool;

use super::encoder::{Encode, Encoder};
use super::item_rows::{ItemRows, RowsOfSnapshot};
use super::ranker::new_pool;
use crate::answer::{
    Answer, Group, Recommendation, Timings, UnknownByField, UnknownNames, shortened,
};
use crate::backend::Backend;
use crate::catalog::allowed::AllowedSet;
use crate::catalog::{Catalog, Snapshot};
use crate::device::{Device, WithBackend};
use crate::engine::{Known, Wishes, check_snapshot};
use crate::error::{Error, Result};
use crate::features;
use crate::models::config::Config;
use crate::models::weights::Weights;
use crate::models::{
    Events, VECTOR_FAMILIES, VectorPrompt, VectorSpec, gives_vectors, load_vectors,
};
use crate::recommender_options::RecommenderOptions;
use crate::request::{Input, MAX_BEAMS, Request, SharedSid, UnknownItems};
use crate::search::{Constraint, Normalization};
use crate::service::AnswersWhole;
use crate::vectors::{Found, ItemMatrix, Metric, Rows, score_rows, top_products};

/// Numbers of an item matrix from which it gets a copy in 8 bits.
const NUMBERS_WORTH_A_COPY: usize = 1 << 20;

/// A network that gives vectors, the items' vectors and a catalog, for any number of callers.
///
/// A request is answered on the caller's thread and the retriever's pool: the newest items of its
/// history become a query vector, and the items with the highest products come back, exactly, under
/// the request's filter, exclusions and list. Scores are products (or minus squared distances), not
/// log-probabilities.
///
/// ```no_run
/// use std::{path::Path, sync::Arc};
/// use sidereal::{RecommenderOptions, Request, Retriever, catalog::Catalog};
///
/// # fn main() -> sidereal::Result<()> {
/// let folder = Path::new("models/sasrec/recbole-small");
/// let catalog = Arc::new(Catalog::open(&folder.join("items.jsonl"))?);
/// let retriever = Retriever::open(folder, catalog, &RecommenderOptions::new("cpu"))?;
/// let request = Request::from_history(["17", "4"]).with_exclude_history(true).with_top_k(5);
/// for found in &retriever.recommend(&request)?.items {
///     println!("{} {:.3}", found.item, found.score);
/// }
/// # Ok(())
/// # }
/// ```
pub struct Retriever {
    encoder: Box<dyn Encode>,
    matrix: ItemMatrix,
    rows: ItemRows,
    catalog: Arc<Catalog>,
    pool: ThreadPool,
}

/// What is read of a folder before its network is put on a device.
struct Open<'a> {
    folder: &'a Path,
    config: Config,
    weights: Weights,
    item_vectors: Option<ItemMatrix>,
    metric: Metric,
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
                    "sidereal.json is missing: it names the \"family\" of a network that gives \
                     vectors ({}) and what its tensors do not tell",
                    VECTOR_FAMILIES.join(", ")
                ),
            });
        }
        let config = Config::read(&path)?;
        let metric = match config.text_or("metric", "dot")? {
            "dot" => Metric::Dot,
            "l2" => Metric::L2,
            other => {
                return Err(
                    config.error(format!("\"metric\" is {other:?}; \"dot\" and \"l2\" are"))
                );
            }
        };
        let item_vectors = match config.text_or("item_vectors", "")? {
            "" => None,
            name => Some(ItemMatrix::open(&folder.join(name), metric)?),
        };
        let weights = match item_vectors {
            Some(_) => Weights::open_beside(folder, config.text_or("item_vectors", "")?)?,
            None => Weights::open(folder)?,
        };
        let num_threads = options.engine.threads;
        Ok(Open { folder, config, weights, item_vectors, metric, catalog, num_threads })
    }
}

impl WithBackend for Open<'_> {
    type Output = Retriever;

    fn run<B: Backend>(self, backend: B) -> Result<Retriever> {
        let Open { folder, config, weights, item_vectors, metric, catalog, num_threads } = self;
        let model = load_vectors(&backend, &config, weights)?;
        let matrix = match item_vectors {
            Some(matrix) => matrix,
            None => ItemMatrix::new(model.items.clone(), model.bias.as_ref(), metric)?,
        };
        let encoder = Box::new(Encoder::new(backend, model)?);
        let VectorSpec { columns, num_rows, .. } = *encoder.spec();
        if matrix.num_columns() != columns || matrix.num_rows() != num_rows {
            return Err(config.error(format!(
                "the item vectors are {} x {}, and the network's own table is {num_rows} x {columns}; \
                 they share their rows",
                matrix.num_rows(),
                matrix.num_columns()
            )));
        }
        let names = folder.join(config.text_or("items", "item_rows.json")?);
        let rows = ItemRows::read(&names, num_rows, true)?;
        let pool = new_pool(num_threads)?;
        // A small matrix is read as fast as a smaller copy of it.
        let matrix = match matrix.num_rows() * columns >= NUMBERS_WORTH_A_COPY {
            true => pool.install(|| matrix.with_codes()),
            false => matrix,
        };
        Ok(Retriever { encoder, matrix, rows, catalog, pool })
    }
}

/// What a request asks for, by the catalog's numbers.
enum Asked {
    /// The best of each of these sets.
    Best(Vec<AllowedSet>),
    /// All of these items.
    Candidates(Vec<u32>),
}

/// A request that was checked.
struct Prepared<'a> {
    request: &'a Request,
    snapshot: Arc<Snapshot>,
    rows: Arc<RowsOfSnapshot>,
    prompt: VectorPrompt,
    num_cut: usize,
    unknown_items: UnknownByField,
    asked: Asked,
}

impl Retriever {
    /// Whether a folder's `sidereal.json` names a family that gives vectors.
    ///
    /// # Errors
    /// The file's, where it is there.
    pub fn serves(folder: &Path) -> Result<bool> {
        gives_vectors(folder)
    }

    /// Opens a model folder: `sidereal.json` with the `family`, weights, and which row is which item.
    /// Of the options, `device`, `dtype` and the engine's `threads` count.
    ///
    /// # Errors
    /// The files': see [`load_vectors`](crate::models::load_vectors); [`Error::ModelFolder`] where the
    /// names of rows are missing; [`Error::Device`], [`Error::InvalidOption`].
    pub fn open(
        folder: &Path,
        catalog: Arc<Catalog>,
        options: &RecommenderOptions,
    ) -> Result<Retriever> {
        let open = Open::read(folder, catalog, options)?;
        let device: Device = options.device.parse()?;
        let dtype = options.dtype.unwrap_or_else(|| device.default_dtype(open.weights.dtype()));
        device.with_backend(Some(dtype), open)
    }

    /// The same, on a device that the caller has opened.
    ///
    /// # Errors
    /// Those of [`open`](Retriever::open).
    pub fn open_on<B: Backend>(
        backend: B,
        folder: &Path,
        catalog: Arc<Catalog>,
        options: &RecommenderOptions,
    ) -> Result<Retriever> {
        Open::read(folder, catalog, options)?.run(backend)
    }

    /// The catalog that is searched.
    pub fn catalog(&self) -> &Arc<Catalog> {
        &self.catalog
    }

    /// The items' vectors.
    pub fn matrix(&self) -> &ItemMatrix {
        &self.matrix
    }

    /// Items of a history that the network reads at most.
    pub fn max_items(&self) -> usize {
        self.encoder.spec().max_items
    }

    /// What computes, as `x86_64 f32x16`.
    pub fn description(&self) -> String {
        self.encoder.description()
    }

    /// Threads that compute.
    pub fn num_threads(&self) -> usize {
        self.pool.current_num_threads()
    }

    /// The query vector of a history, `[columns]`, as the network leaves it.
    ///
    /// # Errors
    /// [`Error::UnknownItem`], [`Error::EmptyInput`], [`Error::NonFiniteScores`].
    pub fn query_vector(&self, request: &Request) -> Result<Vec<f32>> {
        let (events, ..) = self.history(request)?;
        let prompt = self.encoder.prompt(&events)?;
        let query = self.pool.install(|| self.encoder.encode(&[prompt]))?;
        check_finite(&query)?;
        Ok(query)
    }

    /// Answers one request.
    ///
    /// # Errors
    /// The request's; [`Error::FileChanged`].
    pub fn recommend(&self, request: &Request) -> Result<Answer> {
        let mut answers = self.recommend_all(std::slice::from_ref(request));
        answers.pop().expect("an answer for each request")
    }

    /// Answers several requests: their histories are read together. Each answer is the one that the
    /// request gets alone.
    pub fn recommend_all(&self, requests: &[Request]) -> Vec<Result<Answer>> {
        let start = Instant::now();
        let prepared: Vec<Result<Prepared<'_>>> =
            requests.iter().map(|request| self.prepare(request)).collect();
        let prompts: Vec<VectorPrompt> =
            prepared.iter().flatten().map(|prepared| prepared.prompt.clone()).collect();
        let encoded = self.pool.install(|| self.encoder.encode(&prompts));
        let columns = self.matrix.num_columns();
        let mut next = 0;
        let answer = |prepared: Result<Prepared<'_>>| {
            let prepared = prepared?;
            let vectors = encoded.as_ref().map_err(Error::clone)?;
            let query = &vectors[next * columns..(next + 1) * columns];
            next += 1;
            // A vector that is not finite is its own request's error alone.
            check_finite(query)?;
            self.answer(prepared, query, start)
        };
        prepared.into_iter().map(answer).collect()
    }

    /// A request's history, how many items were cut off, and the names that have no row.
    fn history<'r>(&self, request: &'r Request) -> Result<(Events<'r>, usize, UnknownNames)> {
        let Input::History(names) = &request.input else {
            let reason = "a network that gives vectors reads a \"history\" of items".into();
            return Err(Error::InvalidField { field: "tokens", reason });
        };
        let num_cut = names.len().saturating_sub(self.max_items());
        let features = &request.features.history;
        features::check_len("history", features.len(), names.len())?;
        let mut unknown = UnknownNames::default();
        let mut events = Events { time: request.features.time, ..Events::default() };
        for (at, name) in names.iter().enumerate().skip(num_cut) {
            match self.rows.find(name) {
                Some(row) => {
                    events.rows.push(row);
                    events.features.extend(features.get(at));
                }
                None => unknown.push(name),
            }
        }
        let is_enough = match request.unknown_items {
            UnknownItems::Skip => !events.rows.is_empty(),
            UnknownItems::Error => false,
        };
        match unknown.names.first() {
            Some(item) if !is_enough => {
                Err(Error::UnknownItem { field: "history", item: item.clone() })
            }
            _ => Ok((events, num_cut, unknown)),
        }
    }

    fn prepare<'a>(&self, request: &'a Request) -> Result<Prepared<'a>> {
        let snapshot = self.catalog.checked_snapshot()?;
        check_snapshot(request, &snapshot)?;
        check_fields(request)?;
        let mut unknown_items = UnknownByField::default();
        let (events, num_cut, unknown) = self.history(request)?;
        let prompt = self.encoder.prompt(&events)?;
        unknown_items.history = unknown;
        let rows = self.rows.of(&snapshot);
        let asked = match request.candidates.is_empty() {
            true => {
                let wishes = Wishes::of(request, &snapshot, &mut unknown_items)?;
                Asked::Best(wishes.allowed_sets(&snapshot)?)
            }
            false => Asked::Candidates(self.candidates(request, &snapshot, &mut unknown_items)?),
        };
        Ok(Prepared { request, snapshot, rows, prompt, num_cut, unknown_items, asked })
    }

    /// The available items that a request asks to score, each once. Items without a vector count as
    /// unknown.
    fn candidates(
        &self,
        request: &Request,
        snapshot: &Snapshot,
        unknown_items: &mut UnknownByField,
    ) -> Result<Vec<u32>> {
        let names = &request.candidates;
        let len = names.len();
        if len > MAX_BEAMS {
            return Err(Error::LimitExceeded { what: "candidates", len, max: MAX_BEAMS });
        }
        let known = Known::required("candidates", names, snapshot, request.unknown_items)?;
        unknown_items.candidates = known.unknown;
        let mut candidates = Vec::new();
        let mut first_without_vector = None;
        let mut items = known.items;
        let mut seen = std::collections::HashSet::new();
        items.retain(|&item| seen.insert(item));
        for item in items {
            let name = snapshot.name(item);
            match self.rows.find(name) {
                Some(_) if snapshot.is_available(item) => candidates.push(item),
                Some(_) => {}
                None => {
                    first_without_vector.get_or_insert_with(|| shortened(name));
                    unknown_items.candidates.push(name);
                }
            }
        }
        match first_without_vector {
            Some(item) if request.unknown_items == UnknownItems::Error => {
                Err(Error::UnknownItem { field: "candidates", item })
            }
            _ => Ok(candidates),
        }
    }

    fn answer(&self, prepared: Prepared<'_>, query: &[f32], start: Instant) -> Result<Answer> {
        let Prepared { request, snapshot, .. } = &prepared;
        let recommend = |found: &Found| {
            let item = prepared.rows.item(found.row).expect("rows of items are asked for");
            Recommendation::new(snapshot, item, found.score, request.titles)
        };
        let mut lists = Vec::new();
        match &prepared.asked {
            Asked::Best(sets) => {
                for allowed in sets {
                    let found = self.best(&prepared, query, allowed)?;
                    lists.push(found.iter().map(recommend).collect::<Vec<_>>());
                }
            }
            Asked::Candidates(items) => lists.push(self.scores(&prepared, query, items)?),
        }
        self.matrix.check_file()?;
        snapshot.check_file()?;
        let (items, groups) = match request.groups.is_empty() {
            true => (lists.pop().unwrap_or_default(), Vec::new()),
            false => {
                let group = |(filter, items): (&String, _)| Group { filter: filter.clone(), items };
                (Vec::new(), request.groups.iter().zip(lists).map(group).collect())
            }
        };
        let total_us = u64::try_from(start.elapsed().as_micros()).unwrap_or(u64::MAX);
        let timings = request.timings.then(|| Timings { total_us, ..Timings::default() });
        Ok(Answer {
            items,
            groups,
            read: Vec::new(),
            thoughts: Vec::new(),
            sequences: Vec::new(),
            tokens: prepared.prompt.tokens.len(),
            cached_tokens: 0,
            skipped_items: prepared.num_cut,
            weights_version: 1,
            timings,
            unknown_items: prepared.unknown_items,
            snapshot: prepared.snapshot,
        })
    }

    /// The best rows of an allowed set.
    fn best(
        &self,
        prepared: &Prepared<'_>,
        query: &[f32],
        allowed: &AllowedSet,
    ) -> Result<Vec<Found>> {
        let Prepared { request, snapshot, rows, .. } = prepared;
        let is_allowed =
            |row: u32| rows.item(row).is_some_and(|item| allowed.allows(snapshot, item));
        let mut listed: Vec<u32> = Vec::new();
        let rows = match &request.only {
            // The list is as long as the request, so no other row is looked at.
            Some(names) => {
                listed.extend(names.iter().filter_map(|name| self.rows.find(name)));
                listed.retain(|&row| is_allowed(row));
                listed.sort_unstable();
                listed.dedup();
                Rows::Listed(&listed)
            }
            None => Rows::Where(&is_allowed),
        };
        let top_k = request.top_k;
        let found = self.pool.install(|| top_products(query, &self.matrix, rows, top_k))?;
        Ok(found.into_iter().next().unwrap_or_default())
    }

    /// All candidates, best first.
    fn scores(
        &self,
        prepared: &Prepared<'_>,
        query: &[f32],
        items: &[u32],
    ) -> Result<Vec<Recommendation>> {
        let Prepared { request, snapshot, .. } = prepared;
        let row = |&item: &u32| self.rows.find(snapshot.name(item)).expect("checked before");
        let rows: Vec<u32> = items.iter().map(row).collect();
        let scores = score_rows(query, &self.matrix, &rows)?;
        let mut scored: Vec<(u32, u32, f32)> = items
            .iter()
            .zip(rows)
            .zip(scores)
            .map(|((item, row), score)| (*item, row, score))
            .collect();
        scored.sort_by(|a, b| b.2.total_cmp(&a.2).then(a.1.cmp(&b.1)));
        let recommend =
            |(item, _, score)| Recommendation::new(snapshot, item, score, request.titles);
        Ok(scored.into_iter().map(recommend).collect())
    }
}

impl AnswersWhole for Retriever {
    fn catalog(&self) -> &Arc<Catalog> {
        &self.catalog
    }

    fn description(&self) -> String {
        Retriever::description(self)
    }

    fn num_threads(&self) -> usize {
        Retriever::num_threads(self)
    }

    fn max_items(&self) -> usize {
        Retriever::max_items(self)
    }

    fn check(&self, request: &Request) -> Result<()> {
        check_fields(request)
    }

    fn answer_all(&self, requests: &[Request]) -> Vec<Result<Answer>> {
        self.recommend_all(requests)
    }

    fn matrix_flops(&self) -> u64 {
        self.encoder.matrix_flops()
    }
}

fn check_finite(query: &[f32]) -> Result<()> {
    match query.iter().all(|value| value.is_finite()) {
        true => Ok(()),
        false => Err(Error::NonFiniteScores { step: 0 }),
    }
}

/// Refuses what goes with written semantic IDs alone.
fn check_fields(request: &Request) -> Result<()> {
    if request.top_k == 0 {
        return Err(Error::TopK { top_k: 0 });
    }
    let of_searches = [
        ("forced", request.forced.is_some()),
        ("read", !request.read.is_empty()),
        ("think", request.think.is_some()),
        ("seed", request.seed.is_some()),
        ("log_probs", request.log_probs),
        ("sequences", request.sequences),
        ("constraint", request.constraint != Constraint::Trie),
        ("normalize", request.normalization.is_some_and(|it| it != Normalization::Vocabulary)),
        ("phrase_rule", request.phrase_rule.is_some()),
        ("temperature", request.temperature != 1.0),
        ("per_sid", request.per_sid.is_some() || request.shared_sid == SharedSid::First),
    ];
    if let Some((field, _)) = of_searches.into_iter().find(|(_, is_given)| *is_given) {
        let reason = "belongs to models that write semantic IDs; this one scores items by vectors";
        return Err(Error::InvalidField { field, reason: reason.into() });
    }
    let of_best = [
        ("filter", request.filter.is_some()),
        ("exclude", !request.exclude.is_empty()),
        ("exclude_history", request.exclude_history),
        ("only", request.only.is_some()),
        ("groups", !request.groups.is_empty()),
    ];
    match of_best.into_iter().find(|(_, is_given)| *is_given && !request.candidates.is_empty()) {
        Some((field, _)) => {
            let reason = "goes with a search, not with candidates".into();
            Err(Error::InvalidField { field, reason })
        }
        None => Ok(()),
    }
}
