//! `GET /metrics`: the engines' numbers, with a label for the model, and those of the doors.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;

use axum::extract::State as Shared;
use axum::http::header;
use axum::response::{IntoResponse, Response};

use super::error::Outcome;
use super::state::State;
use crate::metrics::Page;

/// `GET /metrics`.
pub(super) async fn metrics(Shared(state): Shared<Arc<State>>) -> Outcome<Response> {
    let mut families = Families::default();
    for served in state.models.all() {
        let labels = format!("model=\"{}\",version=\"{}\"", served.name, served.version);
        families.add(&served.recommender.metrics()?.to_prometheus(), &labels);
    }
    let text = families.text() + &doors(&state) + &process(&state);
    let content_type = "text/plain; version=0.0.4; charset=utf-8";
    Ok(([(header::CONTENT_TYPE, content_type)], text).into_response())
}

/// Families of several pages of one form: the format wants the samples of a family together.
#[derive(Default)]
struct Families {
    /// In the order of the first page.
    order: Vec<String>,
    by_header: BTreeMap<String, String>,
}

impl Families {
    /// Adds a page whose samples get further labels.
    fn add(&mut self, page: &str, labels: &str) {
        let mut header = String::new();
        let mut is_header = false;
        for line in page.lines() {
            if line.starts_with('#') {
                if !std::mem::replace(&mut is_header, true) {
                    header.clear();
                }
                header += line;
                header.push('\n');
                continue;
            }
            if std::mem::take(&mut is_header) && !self.by_header.contains_key(&header) {
                self.order.push(header.clone());
                self.by_header.insert(header.clone(), String::new());
            }
            let samples = self.by_header.get_mut(&header).expect("a page begins with a header");
            *samples += &labelled(line, labels);
            samples.push('\n');
        }
    }

    fn text(&self) -> String {
        self.order.iter().map(|header| format!("{header}{}", self.by_header[header])).collect()
    }
}

/// A sample, `name value` or `name{labels} value`, with labels before its own.
fn labelled(sample: &str, labels: &str) -> String {
    let end = sample.find(['{', ' ']).unwrap_or(sample.len());
    let (name, rest) = sample.split_at(end);
    match rest.strip_prefix('{') {
        Some(rest) => format!("{name}{{{labels},{rest}"),
        None => format!("{name}{{{labels}}}{rest}"),
    }
}

fn doors(state: &State) -> String {
    let metrics = &state.metrics;
    let mut page = Page::default();
    page.header("requests_total", "Requests by door and by how they ended.", "counter");
    for (door, outcome, count) in metrics.requests() {
        let door = door.name();
        page.line(format_args!(
            "sidereal_requests_total{{door=\"{door}\",outcome=\"{outcome}\"}} {count}"
        ));
    }
    let help = "From the arrival of a request at its door to its answer.";
    page.header("door_request_seconds", help, "histogram");
    for (door, seconds) in metrics.seconds() {
        let labels = format!("door=\"{}\"", door.name());
        page.histogram("door_request_seconds", &labels, &seconds, 1e6);
    }
    let read = |counter: &std::sync::atomic::AtomicU64| counter.load(Relaxed);
    let opened = read(&metrics.connections_opened);
    let open = opened.saturating_sub(read(&metrics.connections_closed));
    page.gauge("connections", "Connections that are open.", open);
    page.counter("connections_opened_total", "Connections that were accepted.", opened);
    let help = "Connections that ended before they had spoken TLS.";
    page.counter("tls_failures_total", help, read(&metrics.tls_failures));
    let help = "Calls without the token that they need.";
    page.counter("refused_tokens_total", help, read(&metrics.refused_tokens));
    let help = "Bytes of bodies that came by HTTP.";
    page.counter("received_body_bytes_total", help, read(&metrics.received_bytes));
    let help = "Bytes of bodies that were sent by HTTP, where their length was known.";
    page.counter("sent_body_bytes_total", help, read(&metrics.sent_bytes));
    let help = "Changes of catalogs that were applied.";
    page.counter("catalog_changes_total", help, read(&metrics.changes));
    page.counter(
        "feed_lines_total",
        "Lines of the feed that were read.",
        read(&metrics.feed_lines),
    );
    let help = "Lines of the feed that could not be applied and were passed over.";
    page.counter("feed_errors_total", help, read(&metrics.feed_errors));
    page.gauge("is_ready", "1 where requests should be sent here.", state.is_ready().into());
    page.text
}

fn process(state: &State) -> String {
    let mut page = Page::default();
    page.header("build_info", "The version, as a label.", "gauge");
    page.line(format_args!("sidereal_build_info{{version=\"{}\"}} 1", env!("CARGO_PKG_VERSION")));
    let uptime_us = state.started.elapsed().as_micros() as u64;
    page.seconds("uptime_seconds", "gauge", "Since the server was started.", uptime_us);
    let started = state.started_at.duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
    let started_us = started.as_micros() as u64;
    page.seconds("start_time_seconds", "gauge", "When it was started.", started_us);
    if let Some(bytes) = resident_bytes() {
        page.gauge("resident_memory_bytes", "Memory of the process that is in use.", bytes);
    }
    if let Some(files) = open_files() {
        page.gauge("open_files", "File descriptors of the process.", files);
    }
    page.text
}

/// Where the operating system says so.
fn resident_bytes() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"))?;
    let kib: u64 = line.trim().strip_suffix(" kB")?.parse().ok()?;
    Some(kib << 10)
}

fn open_files() -> Option<u64> {
    Some(std::fs::read_dir("/proc/self/fd").ok()?.count() as u64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn samples_of_a_family_stand_together_with_their_models() {
        let page = "# HELP a One.\n# TYPE a gauge\na 1\n# HELP b Two.\n# TYPE b counter\nb{x=\"y\"} 2\nb{x=\"z\"} 3\n";
        let mut families = Families::default();
        families.add(page, "model=\"m\"");
        families.add(page, "model=\"n\"");
        let expected = "# HELP a One.\n# TYPE a gauge\na{model=\"m\"} 1\na{model=\"n\"} 1\n\
                        # HELP b Two.\n# TYPE b counter\nb{model=\"m\",x=\"y\"} 2\n\
                        b{model=\"m\",x=\"z\"} 3\nb{model=\"n\",x=\"y\"} 2\nb{model=\"n\",x=\"z\"} 3\n";
        assert_eq!(families.text(), expected);
    }
}
