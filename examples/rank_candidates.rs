//! Scores of given items, and the log-probabilities behind them.
//!
//! `cargo run --release --example rank_candidates`

use std::path::Path;
use std::sync::Arc;

use sidereal::catalog::Catalog;
use sidereal::{Input, Recommender, RecommenderOptions, Request, Result};

/// Ranks the output of another retriever, and takes a score apart.
///
/// # Errors
/// Those of the files and of the requests.
pub fn main() -> Result<()> {
    let folder = Path::new("models/industrial");
    let catalog = Arc::new(Catalog::open(&folder.join("items.jsonl"))?);
    let options = RecommenderOptions::new("cpu").with_threads(1);
    let recommender = Recommender::open(folder, catalog, &options)?;

    let history = || Input::History(["550", "812", "1568"].map(String::from).to_vec());
    let candidates = ["326", "3287", "1210", "17", "4"];
    let ranked = recommender.rank(history(), candidates)?;
    for found in &ranked.items {
        println!("{:>5} {:8.4}", found.item, found.score);
    }
    assert_eq!(ranked.items.len(), candidates.len());

    // A score is the sum of the log-probabilities of an item's codes.
    let request = Request::new(history()).with_candidates(candidates).with_log_probs(true);
    let best = &recommender.recommend(&request)?.items[0];
    let mut sum = 0.0;
    for (code, log_prob) in best.sid.codes().iter().zip(&best.log_probs) {
        let (all, legal) = (log_prob.vocabulary, log_prob.children);
        println!("code {code:>3}: {all:8.4} over the vocabulary, {legal:8.4} over legal codes");
        sum += all;
    }
    assert!((sum - best.score).abs() < 1e-3);

    // A search that finds an item gives it the score that ranking it gives.
    let search = Request::new(history()).with_beams(200).with_top_k(200);
    let found = recommender.recommend(&search)?;
    let scores = found.items.iter().filter_map(|found| {
        let ranked = ranked.items.iter().find(|ranked| ranked.item == found.item)?;
        Some((&found.item, found.score, ranked.score))
    });
    for (item, searched, ranked) in scores {
        println!("{item}: {searched:.4} by search, {ranked:.4} by rank");
        assert!((searched - ranked).abs() < 1e-3);
    }
    Ok(())
}
