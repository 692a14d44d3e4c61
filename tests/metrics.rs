//! What an engine counts, and how doors export it.

use std::collections::HashMap;
use std::fmt::Debug;
use std::path::Path;
use std::sync::{Arc, Mutex, mpsc};
use std::time::Duration;

use serde_json::Value;
use sidereal::catalog::Catalog;
use sidereal::metrics::{Gauges, Metrics, MetricsSnapshot};
use sidereal::pages::PAGE_LEN;
use sidereal::{
    Engine, EngineOptions, Error, Input, Recommender, RecommenderOptions, Request, Timings,
};
use tracing::field::{Field, Visit};
use tracing::span::{Attributes, Id, Record};
use tracing::{Event, Metadata, Subscriber};

fn timings(queued_us: u64, prefill_us: u64, levels_us: &[u64]) -> Timings {
    let mut timings = Timings::default();
    (timings.queued_us, timings.prefill_us) = (queued_us, prefill_us);
    timings.levels_us = levels_us.to_vec();
    timings.total_us = queued_us + prefill_us + levels_us.iter().sum::<u64>();
    timings
}

/// An engine's day: two answers, a refusal, a failure, a late one and one that was given up.
fn day(metrics: &Metrics) {
    metrics.request_admitted(20, 16);
    metrics.request_admitted(9, 0);
    metrics.step(29, 13, 1_500);
    metrics.step(4, 0, 250);
    metrics.request_answered(&timings(10, 1_500, &[250, 260, 300]));
    metrics.request_answered(&timings(90, 20_000_000, &[250; 11]));
    metrics.request_refused(&Error::EmptyInput);
    metrics.request_refused(&Error::Overloaded {
        queued: 3,
        limit: 3,
        wait_ms: 20,
        retry_after_ms: 7,
    });
    metrics.request_refused(&Error::EmptyInput);
    metrics.request_failed(&Error::NonFiniteScores { step: 1 });
    let late = Error::DeadlineExceeded { deadline_ms: 5.0, retry_after_ms: Some(2) };
    metrics.request_forecast_late(true);
    metrics.request_failed(&late);
    metrics.work(1_000, 1_750);
    metrics.request_failed(&Error::Cancelled);
}

/// What the engine holds in the evening.
fn evening() -> Gauges {
    let mut gauges = Gauges::default();
    (gauges.waiting, gauges.running) = (5, 2);
    let pages = &mut gauges.pages;
    (pages.context_free, pages.context_cached, pages.context_running) = (100, 20, 3);
    (pages.tail_free, pages.tail_running) = (7, 1);
    (gauges.catalog_snapshot, gauges.weights_version) = (4, 2);
    (gauges.backlog_us, gauges.evicted_pages) = (2_500_000, 12);
    gauges
}

#[test]
fn a_snapshot_holds_what_was_counted() {
    let metrics = Metrics::default();
    day(&metrics);
    let snapshot = metrics.snapshot(evening());
    assert_eq!((snapshot.answered, snapshot.cancelled, snapshot.deadline_exceeded), (2, 1, 1));
    assert_eq!(snapshot.refused, [("empty_input", 2), ("overloaded", 1)]);
    assert_eq!(snapshot.failed, [("non_finite_scores", 1)]);
    assert_eq!((snapshot.request_us.count(), snapshot.request_us.sum), (2, 2_320 + 20_002_840));
    assert_eq!(*snapshot.prefill_us.counts.last().expect("buckets"), 1, "20 s are over all bounds");
    assert_eq!(snapshot.level_us[0].count(), 2);
    // Eleven steps: the last histogram has the eighth to the eleventh.
    assert_eq!(snapshot.level_us.last().expect("levels").count(), 4);
    assert_eq!((snapshot.step_rows.count(), snapshot.step_rows.sum), (2, 33));
    assert_eq!((snapshot.prompt_tokens, snapshot.step_us.sum), (13, 1_750));
    assert_eq!((snapshot.cache_hits, snapshot.cache_misses), (1, 1));
    assert_eq!((snapshot.cache_hit_tokens, snapshot.cache_tokens), (16, 29));
    assert_eq!(snapshot.gauges, evening());
}

#[test]
fn a_value_on_a_bound_belongs_to_its_bucket() {
    let metrics = Metrics::default();
    for total_us in [100, 101] {
        metrics.request_answered(&timings(total_us, 0, &[]));
    }
    let histogram = metrics.snapshot(Gauges::default()).request_us;
    assert_eq!((histogram.bounds[0], &histogram.counts[..3]), (100, &[1, 1, 0][..]));
}

/// Name and labels of each sample with its value, after the checks of the text format.
fn samples(text: &str) -> HashMap<String, f64> {
    assert!(text.ends_with('\n'), "the last line ends");
    let (mut found, mut family, mut kind) = (HashMap::new(), String::new(), String::new());
    for line in text.lines() {
        if let Some(help) = line.strip_prefix("# HELP ") {
            family = help.split(' ').next().expect("a name").to_string();
            assert!(help.len() > family.len() + 1, "{family} has a help text");
        } else if let Some(of) = line.strip_prefix("# TYPE ") {
            let (name, of) = of.split_once(' ').expect("a name and a type");
            assert_eq!(name, family, "TYPE follows HELP");
            kind = of.to_string();
        } else {
            let (name, value) = line.rsplit_once(' ').expect("a sample");
            let plain = name.split('{').next().expect("a name");
            let suffixes: &[&str] = match kind.as_str() {
                "histogram" => &["_bucket", "_sum", "_count"],
                "counter" | "gauge" => &[""],
                other => panic!("{other} is no type"),
            };
            let is_own = suffixes.iter().any(|suffix| plain == format!("{family}{suffix}"));
            assert!(is_own && plain.starts_with("sidereal_"), "{line} is under {family}");
            assert_eq!(kind == "counter", plain.ends_with("_total"), "{line}");
            let value = value.parse().expect("a number");
            assert!(found.insert(name.to_string(), value).is_none(), "{name} twice");
        }
    }
    found
}

#[test]
fn prometheus_text_is_sound_and_says_what_was_counted() {
    let metrics = Metrics::default();
    samples(&metrics.snapshot(Gauges::default()).to_prometheus());
    day(&metrics);
    let text = metrics.snapshot(evening()).to_prometheus();
    let samples = samples(&text);
    for (name, value) in [
        ("sidereal_requests_answered_total", 2.0),
        ("sidereal_requests_cancelled_total", 1.0),
        ("sidereal_requests_deadline_exceeded_total", 1.0),
        ("sidereal_requests_refused_total{code=\"empty_input\"}", 2.0),
        ("sidereal_requests_refused_total{code=\"overloaded\"}", 1.0),
        ("sidereal_requests_failed_total{code=\"non_finite_scores\"}", 1.0),
        ("sidereal_requests_refused_by_forecast_total", 1.0),
        ("sidereal_work_predicted_seconds_total", 0.001),
        ("sidereal_work_seconds_total", 0.00175),
        ("sidereal_backlog_seconds", 2.5),
        ("sidereal_prefix_cache_evicted_pages_total", 12.0),
        ("sidereal_requests_waiting", 5.0),
        ("sidereal_pages{kind=\"context\",owner=\"cache\"}", 20.0),
        ("sidereal_pages{kind=\"tail\",owner=\"free\"}", 7.0),
        ("sidereal_prefix_cache_tokens_total{result=\"hit\"}", 16.0),
        ("sidereal_prefix_cache_tokens_total{result=\"miss\"}", 13.0),
        ("sidereal_catalog_snapshot", 4.0),
        ("sidereal_request_seconds_count", 2.0),
        ("sidereal_request_seconds_sum", 20.00516),
        ("sidereal_request_seconds_bucket{le=\"0.002\"}", 0.0),
        ("sidereal_request_seconds_bucket{le=\"0.003\"}", 1.0),
        ("sidereal_request_seconds_bucket{le=\"10\"}", 1.0),
        ("sidereal_request_seconds_bucket{le=\"+Inf\"}", 2.0),
        ("sidereal_request_phase_seconds_bucket{phase=\"queued\",le=\"0.0001\"}", 2.0),
        ("sidereal_request_level_seconds_count{level=\"7\"}", 4.0),
        ("sidereal_step_rows_bucket{le=\"4\"}", 1.0),
        ("sidereal_step_rows_bucket{le=\"32\"}", 2.0),
    ] {
        assert_eq!(samples.get(name), Some(&value), "{name} in\n{text}");
    }
    // Buckets are summed up, and the last of them is the count.
    let buckets: Vec<&str> =
        text.lines().filter(|line| line.starts_with("sidereal_step_seconds_bucket")).collect();
    let count = |line: &str| -> f64 {
        line.rsplit_once(' ').expect("a sample").1.parse().expect("a number")
    };
    assert!(buckets.is_sorted_by(|a, b| count(a) <= count(b)), "{buckets:?}");
    assert_eq!(count(buckets.last().expect("+Inf")), samples["sidereal_step_seconds_count"]);
}

/// Collects the fields of events as text, and names and fields of spans.
#[derive(Clone, Default)]
struct Collector(Arc<Mutex<Vec<String>>>);

struct Fields(String);

impl Visit for Fields {
    fn record_debug(&mut self, field: &Field, value: &dyn Debug) {
        self.0 += &format!("{}={value:?} ", field.name());
    }
}

impl Subscriber for Collector {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        metadata.target() == "sidereal"
    }

    fn new_span(&self, attributes: &Attributes<'_>) -> Id {
        let mut fields = Fields(format!("span={} ", attributes.metadata().name()));
        attributes.record(&mut fields);
        self.0.lock().expect("no holder panics").push(fields.0);
        Id::from_u64(1)
    }

    fn record(&self, _: &Id, _: &Record<'_>) {}

    fn record_follows_from(&self, _: &Id, _: &Id) {}

    fn event(&self, event: &Event<'_>) {
        let mut fields = Fields(String::new());
        event.record(&mut fields);
        self.0.lock().expect("no holder panics").push(fields.0);
    }

    fn enter(&self, _: &Id) {}

    fn exit(&self, _: &Id) {}
}

#[test]
fn what_is_counted_is_told_to_a_subscriber_as_well() {
    let collector = Collector::default();
    tracing::subscriber::with_default(collector.clone(), || day(&Metrics::default()));
    let events = collector.0.lock().expect("no holder panics");
    let has = |words: &[&str]| {
        let is_it = |event: &&String| words.iter().all(|word| event.contains(word));
        assert_eq!(events.iter().filter(is_it).count(), 1, "{words:?} in {events:#?}");
    };
    has(&["request answered", "queued_us=10 ", "prefill_us=1500 ", "levels_us=[250, 260, 300] "]);
    has(&["request refused", "code=\"overloaded\"", "3 requests wait"]);
    has(&["request failed", "code=\"deadline_exceeded\""]);
    has(&["request failed", "code=\"cancelled\""]);
    has(&["step", "rows=29 ", "prompt_tokens=13 ", "took_us=1500 "]);
    has(&["request admitted", "tokens=20 ", "cached_tokens=16 "]);
}

fn catalog_and_folder() -> (Arc<Catalog>, std::path::PathBuf) {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("models/decoder_only/qwen3-tied");
    let golden = std::fs::read(folder.join("golden.json")).expect("golden answers");
    let golden: Value = serde_json::from_slice(&golden).expect("golden answers");
    let items = folder.join(golden["items_index"].as_str().expect("a path"));
    (Arc::new(Catalog::open(&items).expect("a catalog")), folder)
}

fn open() -> Engine {
    let (catalog, folder) = catalog_and_folder();
    let options = EngineOptions::default().with_threads(1);
    Engine::open(&folder, catalog, &options).expect("a model")
}

fn request() -> Request {
    let mut request = Request::from_tokens((0..100).map(|n| n % 40).collect::<Vec<u32>>());
    request.beams = 5;
    request
}

/// Checks what must hold of every engine that nothing waits for.
fn check_sums(metrics: &MetricsSnapshot) {
    let answered = metrics.answered;
    for histogram in [&metrics.request_us, &metrics.queued_us, &metrics.prefill_us] {
        assert_eq!(histogram.count(), answered);
    }
    assert_eq!((metrics.gauges.waiting, metrics.gauges.running), (0, 0));
    assert_eq!((metrics.gauges.pages.context_running, metrics.gauges.pages.tail_running), (0, 0));
    assert_eq!(metrics.step_us.count(), metrics.step_rows.count());
    // Each sample of the text format is there, whatever the numbers are.
    let samples = samples(&metrics.to_prometheus());
    assert_eq!(samples["sidereal_requests_answered_total"], answered as f64);
    assert_eq!(samples["sidereal_step_rows_sum"], metrics.step_rows.sum as f64);
    let of_code = |(family, codes): (&str, &Vec<(&str, u64)>)| {
        for (code, count) in codes {
            let name = format!("sidereal_requests_{family}_total{{code=\"{code}\"}}");
            assert_eq!(samples[&name], *count as f64);
        }
    };
    [("refused", &metrics.refused), ("failed", &metrics.failed)].into_iter().for_each(of_code);
}

#[test]
fn an_engine_counts_its_requests_and_steps() {
    let mut engine = open();
    let opened = engine.metrics();
    assert_eq!((opened.step_us.count(), opened.answered), (0, 0));
    assert_eq!((opened.gauges.catalog_snapshot, opened.gauges.weights_version), (1, 1));
    assert_eq!(opened.gauges.pages.tail_free, engine.status().tail_pages as u64);

    let answers: Vec<_> =
        (0..2).map(|_| engine.recommend(&request()).expect("a sound request")).collect();
    assert_eq!((answers[0].cached_tokens, answers[1].cached_tokens), (0, PAGE_LEN));
    assert!(matches!(engine.recommend(&Request::from_tokens([])), Err(Error::EmptyInput)));
    let steps = engine.metrics().step_us.count();

    // One is given up while it waits, one while it runs; a deadline goes by.
    let (sender, told) = mpsc::channel();
    let submit = |request: Request, engine: &mut Engine| {
        let sender = sender.clone();
        let told = move |answer| sender.send(answer).expect("the test listens");
        engine.submit(request, told).expect("a sound request")
    };
    let waits = submit(request(), &mut engine);
    engine.cancel(waits);
    let runs = submit(request(), &mut engine);
    engine.step().expect("a step");
    let pages = engine.metrics().gauges.pages;
    assert!(pages.context_running > 0 && pages.tail_running > 0, "{pages:?}");
    assert_eq!(engine.metrics().gauges.running, 1);
    engine.cancel(runs);
    let mut late = request();
    late.deadline = Some(Duration::ZERO);
    submit(late, &mut engine);
    assert_eq!(engine.metrics().gauges.waiting, 1);
    engine.step().expect("a step");
    let codes: Vec<&str> = told.try_iter().map(|answer| answer.expect_err("none").code()).collect();
    assert_eq!(codes, ["cancelled", "cancelled", "deadline_exceeded"]);

    let metrics = engine.metrics();
    check_sums(&metrics);
    assert_eq!((metrics.answered, metrics.cancelled, metrics.deadline_exceeded), (2, 2, 1));
    assert_eq!(
        (metrics.refused.clone(), metrics.failed.clone()),
        (vec![("empty_input", 1)], vec![])
    );
    // Three were admitted, two of which found the first page of their context.
    assert_eq!((metrics.cache_hits, metrics.cache_misses), (2, 1));
    assert_eq!((metrics.cache_hit_tokens, metrics.cache_tokens), (2 * PAGE_LEN as u64, 300));
    assert_eq!(metrics.prompt_tokens, 300 - 2 * PAGE_LEN as u64);
    assert_eq!(metrics.step_us.count(), steps + 1, "a step without a request is none");
    // The rows are the tokens of prompts, and the beams: one count a level that follows another.
    let num_levels = metrics.level_us.iter().filter(|level| level.count() > 0).count() as u64;
    assert!(metrics.level_us.iter().all(|level| [0, 2].contains(&level.count())));
    assert_eq!(steps, 2 * (1 + num_levels), "a step for the prompt, and one a level");
    assert!(metrics.step_rows.sum > metrics.prompt_tokens);
    assert_eq!(metrics.gauges.pages.context_cached, engine.status().cached_context_pages as u64);
}

#[test]
fn a_recommender_counts_what_it_refuses() {
    let (catalog, folder) = catalog_and_folder();
    let (opened, gate) = mpsc::channel::<()>();
    let gate = Mutex::new(gate);
    let options = RecommenderOptions::new("cpu").with_threads(1).with_max_queued(2);
    let options = options.with_before_step(move |step| {
        if step == 0 {
            let _ = gate.lock().expect("no holder panics").recv(); // open either way
        }
    });
    let recommender = Recommender::open(&folder, catalog, &options).expect("a model");
    let unsound = Request::from_tokens([]);
    assert!(recommender.submit(unsound.clone()).is_err());
    let deferred = recommender.submit_deferred(unsound).expect("room");
    // The engine's thread takes what is queued until its first step, which waits for the gate.
    let first = recommender.submit(request()).or_else(|_| recommender.submit(request()));
    assert_eq!(deferred.wait().expect_err("it is unsound").code(), "empty_input");
    let mut handles = vec![first.expect("room")];
    let mut overloaded = 0;
    while overloaded < 3 {
        match recommender.submit(request()) {
            Ok(handle) => handles.push(handle),
            Err(error) => {
                assert_eq!(error.code(), "overloaded");
                overloaded += 1;
            }
        }
    }
    let all = recommender.submit_all(vec![request(); 2]);
    assert!(all.into_iter().all(|handle| handle.is_err_and(|error| error.code() == "overloaded")));
    assert_eq!(recommender.metrics().expect("one process").gauges.waiting, 2);
    drop(opened);
    let accepted = handles.len() as u64;
    for handle in handles {
        handle.wait().expect("a sound request");
    }
    assert!(recommender.rank(Input::Tokens(vec![1]), [""; 0]).is_err());
    recommender.shutdown(Duration::from_secs(60)).expect("one process");
    assert!(recommender.recommend(&request()).is_err());
    recommender.recommend_all(&[request(), request()], |_, answer| assert!(answer.is_err()));
    let metrics = recommender.metrics().expect("one process");
    let expected =
        [("empty_input", 2), ("invalid_field", 1), ("overloaded", 5), ("shutting_down", 3)];
    let mut refused = metrics.refused.clone();
    refused.sort_unstable();
    assert_eq!(refused, expected);
    assert_eq!((metrics.answered, metrics.failed.len()), (accepted, 0));
    check_sums(&metrics);
}

#[test]
fn requests_and_steps_are_spans() {
    let collector = Collector::default();
    let mut engine = open();
    tracing::subscriber::with_default(collector.clone(), || {
        engine.recommend(&request()).expect("a sound request")
    });
    let lines = collector.0.lock().expect("no holder panics");
    let count = |start: &str| lines.iter().filter(|line| line.starts_with(start)).count() as u64;
    assert_eq!(count("span=request id=1 "), 1, "{lines:#?}");
    assert_eq!(count("span=step rows="), engine.metrics().step_us.count(), "{lines:#?}");
    assert_eq!(count("span=step rows=100 prompt_tokens=100 "), 1, "{lines:#?}");
}
