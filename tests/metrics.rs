//! What an engine counts, and how doors export it.

use std::collections::HashMap;
use std::fmt::Debug;
use std::sync::{Arc, Mutex};

use sidereal::metrics::{Metrics, Outcome, PageCounts};
use sidereal::{Error, Timings};
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
    metrics.request_finished(&timings(10, 1_500, &[250, 260, 300]), Outcome::Answered);
    metrics.request_finished(&timings(90, 20_000_000, &[250; 11]), Outcome::Answered);
    metrics.request_refused(&Error::EmptyInput);
    metrics.request_refused(&Error::Overloaded { queued: 3, limit: 3 });
    metrics.request_refused(&Error::EmptyInput);
    let none = Timings::default();
    metrics.request_finished(&none, Outcome::Failed(&Error::NonFiniteScores { step: 1 }));
    let late = Error::DeadlineExceeded { deadline_ms: 5 };
    metrics.request_finished(&none, Outcome::Failed(&late));
    metrics.request_finished(&none, Outcome::Cancelled);
    metrics.set_requests(5, 2);
    let mut pages = PageCounts::default();
    (pages.context_free, pages.context_cached, pages.context_running) = (100, 20, 3);
    (pages.tail_free, pages.tail_running) = (7, 1);
    metrics.set_pages(pages);
    metrics.set_catalog_snapshot(4);
    metrics.set_weights_version(2);
}

#[test]
fn a_snapshot_holds_what_was_counted() {
    let metrics = Metrics::default();
    day(&metrics);
    let snapshot = metrics.snapshot();
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
    assert_eq!((snapshot.waiting, snapshot.running), (5, 2));
    assert_eq!((snapshot.catalog_snapshot, snapshot.weights_version), (4, 2));
}

#[test]
fn a_value_on_a_bound_belongs_to_its_bucket() {
    let metrics = Metrics::default();
    for total_us in [100, 101] {
        metrics.request_finished(&timings(total_us, 0, &[]), Outcome::Answered);
    }
    let histogram = metrics.snapshot().request_us;
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
    samples(&metrics.snapshot().to_prometheus());
    day(&metrics);
    let text = metrics.snapshot().to_prometheus();
    let samples = samples(&text);
    for (name, value) in [
        ("sidereal_requests_answered_total", 2.0),
        ("sidereal_requests_cancelled_total", 1.0),
        ("sidereal_requests_deadline_exceeded_total", 1.0),
        ("sidereal_requests_refused_total{code=\"empty_input\"}", 2.0),
        ("sidereal_requests_refused_total{code=\"overloaded\"}", 1.0),
        ("sidereal_requests_failed_total{code=\"non_finite_scores\"}", 1.0),
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

/// Collects the fields of events as text.
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

    fn new_span(&self, _: &Attributes<'_>) -> Id {
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
    has(&["request refused", "code=\"overloaded\"", "3 requests wait already"]);
    has(&["request failed", "code=\"deadline_exceeded\""]);
    has(&["request cancelled"]);
    has(&["step", "rows=29 ", "prompt_tokens=13 ", "took_us=1500 "]);
    has(&["request admitted", "tokens=20 ", "cached_tokens=16 "]);
}
