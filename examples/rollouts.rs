//! Rollouts of a training loop: seeded samples with log-probabilities, and replaced weights.
//!
//! `cargo run --release --example rollouts`

use std::path::Path;
use std::sync::Arc;

use sidereal::catalog::Catalog;
use sidereal::models::weights::Weights;
use sidereal::{Recommender, RecommenderOptions, Request, Result, Tensor};

/// Three rounds of sampling, each with the weights of the round before, changed a little.
///
/// # Errors
/// Those of the files, of the weights and of the requests.
pub fn main() -> Result<()> {
    let folder = Path::new("models/industrial");
    let catalog = Arc::new(Catalog::open(&folder.join("items.jsonl"))?);
    let options = RecommenderOptions::new("cpu").with_threads(1);
    let recommender = Recommender::open(folder, catalog, &options)?;
    let histories = [vec!["550", "812", "1568"], vec!["447", "230", "2520", "1083"]];

    // A trainer would send all tensors; here one of them changes.
    let mut weights = Weights::open(folder)?;
    let shapes = weights.shapes();
    let (name, shape) = shapes.iter().find(|(_, shape)| shape.len() == 2).expect("a matrix");
    let mut values = weights.take(name, shape)?.to_vec();

    let mut of_round = Vec::new();
    for round in 1..4 {
        let mut sampled = Vec::new();
        for (user, history) in histories.iter().enumerate() {
            let request = Request::from_history(history.clone()).with_beams(8).with_top_k(8);
            // The seed makes the draw repeatable, in any batch.
            let request = request.with_seed(user as u64).with_log_probs(true);
            let answer = recommender.recommend(&request)?;
            assert_eq!(answer.weights_version, round);
            assert_eq!(answer, recommender.recommend(&request)?, "equal seeds draw equal items");
            for found in &answer.items {
                // A policy gradient needs the sampled item and its log-probability.
                let log_prob: f32 = found.log_probs.iter().map(|code| code.children).sum();
                assert!(log_prob <= 0.0);
                sampled.push((user, found.item.clone(), log_prob));
            }
        }
        println!("round {round}: {:?}", &sampled[..2]);
        of_round.push(sampled);

        values.iter_mut().for_each(|value| *value *= 0.9);
        let tensor = Tensor::new(shape, values.clone());
        let version = recommender.replace_weights([(name.clone(), tensor)])?;
        assert_eq!(version, round + 1);
    }
    assert_ne!(of_round[0], of_round[2], "other weights give other probabilities");
    Ok(())
}
