//! Recommendations in a program: open a model and a catalog, ask, read the answer.
//!
//! `cargo run --release --example embed`

use std::path::Path;
use std::sync::Arc;

use sidereal::catalog::Catalog;
use sidereal::{Recommender, RecommenderOptions, Request, Result};

/// Answers one user in three ways.
///
/// # Errors
/// Those of the files and of the requests.
pub fn main() -> Result<()> {
    let folder = Path::new("models/industrial");
    let catalog = Arc::new(Catalog::open(&folder.join("items.jsonl"))?);
    let options = RecommenderOptions::new("cpu").with_threads(1); // or "cuda:0"
    let recommender = Recommender::open(folder, catalog, &options)?;

    let history = ["550", "812", "1568"];
    let request = Request::from_history(history).with_beams(20).with_top_k(5).with_titles(true);
    let answer = recommender.recommend(&request)?;
    for found in &answer.items {
        let title = found.title.as_deref().unwrap_or("no title");
        println!("{:>5} {:7.3} {:?} {title}", found.item, found.score, found.sid.codes());
    }
    assert_eq!(answer.items.len(), 5);
    assert!(answer.items.is_sorted_by(|a, b| a.score >= b.score), "best first");

    // Items that the user has bought do not come back.
    let best = answer.items[0].item.clone();
    let without = recommender.recommend(&request.clone().with_exclude([best.clone()]))?;
    assert!(without.items.iter().all(|found| found.item != best));

    // A user without a history is asked for with the prompt's own tokens.
    let stranger = recommender.recommend(&Request::from_history([""; 0]).with_top_k(3))?;
    assert_eq!(stranger.items.len(), 3);

    // Errors say whose they are.
    let error = recommender.recommend(&Request::from_history(["no such item"]));
    let error = error.expect_err("the catalog does not have it");
    println!("{} ({}): {error}", error.code(), error.kind().name());
    Ok(())
}
