//! A toy training loop around the engine: rollouts, rewards, and weights replaced between steps.
//!
//! Group-relative policy gradients (GRPO, Shao et al. 2024) of one small tensor, whose gradient is
//! estimated from the engine's own log-probabilities along random directions (Spall 1992), so that no
//! other framework is needed.
//!
//! `cargo run --release --example rollouts`

use std::path::Path;
use std::sync::Arc;

use sidereal::catalog::Catalog;
use sidereal::models::weights::Weights;
use sidereal::{Normalization, Recommender, RecommenderOptions, Request, Result, Tensor};

const TRAINED: &str = "model.norm.weight";
const HISTORY: [&str; 4] = ["447", "230", "2520", "1083"];

/// Scores of items after the history, in the items' order: log p over the legal codes.
fn scores(recommender: &Recommender, items: &[String]) -> Result<Vec<f32>> {
    let request = Request::from_history(HISTORY).with_candidates(items.to_vec());
    let answer = recommender.recommend(&request.with_normalization(Normalization::Children))?;
    let score = |item: &String| answer.items.iter().find(|found| found.item == *item);
    Ok(items.iter().map(|item| score(item).map_or(0.0, |found| found.score)).collect())
}

/// Teaches the demo model to recommend tape.
///
/// # Errors
/// Those of the files, of the weights and of the requests.
pub fn main() -> Result<()> {
    let folder = Path::new("models/industrial");
    let catalog = Arc::new(Catalog::open(&folder.join("items.jsonl"))?);
    let snapshot = catalog.snapshot();
    let is_tape = |item: u32| snapshot.title(item).is_some_and(|title| title.contains("Tape"));
    let tapes = snapshot.all_items().filter(|&item| is_tape(item));
    let tapes: Vec<String> = tapes.map(|item| snapshot.name(item).to_string()).collect();
    let options = RecommenderOptions::new("cpu").with_threads(1);
    let recommender = Recommender::open(folder, catalog, &options)?;
    let mut values = Weights::open(folder)?.take(TRAINED, &[128])?.to_vec();
    let tensor = |values: &[f32]| (TRAINED.to_string(), Tensor::new(&[128], values.to_vec()));
    let replace = |values: &[f32]| recommender.replace_weights([tensor(values)]);
    // The probability of a tape: the mean reward of plain samples.
    let mean_reward =
        || Ok(scores(&recommender, &tapes)?.iter().map(|score| score.exp()).sum::<f32>());
    let before: f32 = mean_reward()?;
    let mut rng = fastrand::Rng::with_seed(7);
    for step in 0..6 {
        // A group of rollouts; equal seeds draw equal items, in any batch.
        let request = Request::from_history(HISTORY).with_beams(48).with_top_k(48).with_seed(step);
        let items = recommender.recommend(&request)?.items.into_iter().map(|found| found.item);
        let items: Vec<String> = items.collect();
        let rewards: Vec<f32> =
            items.iter().map(|item| f32::from(u8::from(tapes.contains(item)))).collect();
        let mean = rewards.iter().sum::<f32>() / rewards.len() as f32;
        let mut gradient = vec![0.0; values.len()];
        for _ in 0..6 {
            let direction = || if rng.bool() { 0.02 } else { -0.02 };
            let direction: Vec<f32> = std::iter::repeat_with(direction).take(128).collect();
            let mut slope = 0.0;
            for side in [1.0, -1.0] {
                replace(&moved(&values, side, &direction))?;
                let scores = scores(&recommender, &items)?.into_iter().zip(&rewards);
                slope += side * scores.map(|(score, reward)| score * (reward - mean)).sum::<f32>();
            }
            gradient = moved(&gradient, slope, &direction);
        }
        let norm = gradient.iter().map(|x| x * x).sum::<f32>().sqrt();
        values = moved(&values, 1.5 / norm, &gradient);
        replace(&values)?;
        println!("step {step}: probability of a tape {:.4}", mean_reward()?);
    }
    assert!(mean_reward()? > 1.2 * before, "it learns");
    Ok(())
}

fn moved(from: &[f32], by: f32, direction: &[f32]) -> Vec<f32> {
    from.iter().zip(direction).map(|(x, step)| x + by * step).collect()
}
