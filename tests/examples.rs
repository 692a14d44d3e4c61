//! Every example runs, and what it asserts holds.

use std::collections::BTreeSet;
use std::path::Path;

#[path = "../examples/callers.rs"]
mod callers;
#[path = "../examples/catalog_changes.rs"]
mod catalog_changes;
#[path = "../examples/embed.rs"]
mod embed;
#[path = "../examples/metrics_export.rs"]
mod metrics_export;
#[path = "../examples/rank_candidates.rs"]
mod rank_candidates;
#[path = "../examples/rollouts.rs"]
mod rollouts;

const NAMES: [&str; 6] =
    ["embed", "callers", "catalog_changes", "rank_candidates", "metrics_export", "rollouts"];

#[test]
fn a_program_embeds_an_engine() {
    embed::main().expect("it ends well");
}

#[test]
fn callers_of_all_kinds_share_an_engine() {
    callers::main().expect("it ends well");
}

#[test]
fn a_catalog_changes_while_it_is_searched() {
    catalog_changes::main().expect("it ends well");
}

#[test]
fn candidates_are_ranked_and_scores_taken_apart() {
    rank_candidates::main().expect("it ends well");
}

#[test]
fn metrics_are_scraped() {
    metrics_export::main().expect("it ends well");
}

#[test]
fn rollouts_follow_the_weights() {
    rollouts::main().expect("it ends well");
}

#[test]
fn every_example_is_run_here_and_is_short() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("examples");
    let mut found = BTreeSet::new();
    for entry in std::fs::read_dir(folder).expect("the examples") {
        let path = entry.expect("an example").path();
        let text = std::fs::read_to_string(&path).expect("an example");
        assert!(text.lines().count() < 80, "{path:?} is long");
        let name = path.file_stem().expect("a name").to_string_lossy().into_owned();
        let command = format!("//! `cargo run --release --example {name}`\n");
        assert!(text.contains(&command), "{path:?} says how it is run");
        found.insert(name);
    }
    assert_eq!(found, NAMES.map(String::from).into());
}
