//! Recall, NDCG, coverage and popularity of lists of items.

use std::collections::HashMap;

use serde::ser::SerializeMap;
use serde::{Serialize, Serializer};
use sidereal::Answer;

/// What was found of the targets of some requests.
#[derive(Clone)]
pub struct Tally {
    requests: u64,
    found: Vec<u64>,
    gain: Vec<f64>,
}

impl Tally {
    pub fn new(cutoffs: &[usize]) -> Tally {
        Tally { requests: 0, found: vec![0; cutoffs.len()], gain: vec![0.0; cutoffs.len()] }
    }

    /// Counts a request whose target has a rank, from one, or was not found.
    pub fn add(&mut self, cutoffs: &[usize], rank: Option<usize>) {
        self.requests += 1;
        let Some(rank) = rank else { return };
        for (at, _) in cutoffs.iter().enumerate().filter(|(_, cutoff)| rank <= **cutoff) {
            self.found[at] += 1;
            self.gain[at] += 1.0 / (rank as f64 + 1.0).log2();
        }
    }

    /// [`NaN`](f64::NAN) of no requests.
    pub fn metrics(&self, cutoffs: &[usize]) -> Metrics {
        let share = |sum: f64| sum / self.requests as f64;
        Metrics {
            cutoffs: cutoffs.to_vec(),
            recall: self.found.iter().map(|&found| share(found as f64)).collect(),
            ndcg: self.gain.iter().map(|&gain| share(gain)).collect(),
        }
    }

    pub fn requests(&self) -> u64 {
        self.requests
    }
}

/// Recall and NDCG at each cutoff; as JSON `{"recall_at_5": ..., "ndcg_at_5": ...}`.
#[derive(Clone)]
pub struct Metrics {
    pub cutoffs: Vec<usize>,
    pub recall: Vec<f64>,
    pub ndcg: Vec<f64>,
}

impl Serialize for Metrics {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut map = serializer.serialize_map(Some(2 * self.cutoffs.len()))?;
        for (name, values) in [("recall", &self.recall), ("ndcg", &self.ndcg)] {
            for (cutoff, value) in self.cutoffs.iter().zip(values) {
                map.serialize_entry(&format!("{name}_at_{cutoff}"), value)?;
            }
        }
        map.end()
    }
}

/// What is recommended, to all users together.
#[derive(Default)]
pub struct Spread {
    items: HashMap<String, Seen>,
}

/// How often an item was seen.
#[derive(Clone, Default)]
struct Seen {
    in_histories: u64,
    as_target: u64,
    /// By cutoff: lists that have it among the first.
    in_lists: Vec<u64>,
}

/// As JSON `{"coverage_at_5": ..., "popularity_at_5": ..., "target_popularity": ...}`.
pub struct SpreadReport {
    cutoffs: Vec<usize>,
    /// By cutoff: items of the catalog that stand in at least one list, as a share.
    pub coverage: Vec<f64>,
    /// By cutoff: histories that a recommended item stands in, on average.
    pub popularity: Vec<f64>,
    /// The same of the targets, which says what popularity would be right.
    pub target_popularity: f64,
}

impl Serialize for SpreadReport {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut map = serializer.serialize_map(Some(2 * self.cutoffs.len() + 1))?;
        for (name, values) in [("coverage", &self.coverage), ("popularity", &self.popularity)] {
            for (cutoff, value) in self.cutoffs.iter().zip(values) {
                map.serialize_entry(&format!("{name}_at_{cutoff}"), value)?;
            }
        }
        map.serialize_entry("target_popularity", &self.target_popularity)?;
        map.end()
    }
}

impl Spread {
    pub fn add_history<'a>(&mut self, items: impl Iterator<Item = &'a str>) {
        let mut seen: Vec<&str> = items.collect();
        seen.sort_unstable();
        seen.dedup();
        for item in seen {
            self.of(item).in_histories += 1;
        }
    }

    pub fn add_answer(&mut self, cutoffs: &[usize], answer: &Answer, target: &str) {
        self.of(target).as_target += 1;
        let most = cutoffs.iter().copied().max().unwrap_or(0);
        for (rank, found) in answer.items.iter().enumerate().take(most) {
            let in_lists = &mut self.of(&found.item).in_lists;
            in_lists.resize(cutoffs.len(), 0);
            for (at, _) in cutoffs.iter().enumerate().filter(|(_, cutoff)| rank < **cutoff) {
                in_lists[at] += 1;
            }
        }
    }

    fn of(&mut self, item: &str) -> &mut Seen {
        if !self.items.contains_key(item) {
            self.items.insert(item.to_string(), Seen::default());
        }
        self.items.get_mut(item).expect("it was just put there")
    }

    /// Of a catalog of so many items.
    pub fn report(&self, cutoffs: &[usize], num_items: usize) -> SpreadReport {
        let in_lists = |seen: &Seen, at: usize| seen.in_lists.get(at).copied().unwrap_or(0);
        let mean = |weight: &dyn Fn(&Seen) -> u64| {
            let (mut sum, mut count) = (0, 0);
            for seen in self.items.values() {
                sum += weight(seen) * seen.in_histories;
                count += weight(seen);
            }
            sum as f64 / count.max(1) as f64
        };
        let covered = |at: usize| self.items.values().filter(|seen| in_lists(seen, at) > 0).count();
        let at = 0..cutoffs.len();
        let coverage: Vec<f64> =
            at.clone().map(|at| covered(at) as f64 / num_items.max(1) as f64).collect();
        let popularity: Vec<f64> = at.map(|at| mean(&|seen| in_lists(seen, at))).collect();
        let target_popularity = mean(&|seen| seen.as_target);
        SpreadReport { cutoffs: cutoffs.to_vec(), coverage, popularity, target_popularity }
    }
}

/// The target's rank, from one, by semantic ID and by item.
pub fn ranks(answer: &Answer, target: u32) -> (Option<usize>, Option<usize>) {
    let (target, target_sid) = (answer.snapshot.name(target), answer.snapshot.sid(target));
    let mut sids: Vec<_> = answer.items.iter().map(|found| found.sid).collect();
    sids.dedup();
    let sid_rank = sids.iter().position(|&sid| sid == target_sid).map(|at| at + 1);
    let item_rank = answer.items.iter().position(|found| found.item == target).map(|at| at + 1);
    (sid_rank, item_rank)
}

#[cfg(test)]
mod tests {
    use super::*;

    const CUTOFFS: [usize; 3] = [1, 2, 4];

    #[test]
    fn recall_and_ndcg_count_what_stands_above_a_cutoff() {
        let mut tally = Tally::new(&CUTOFFS);
        for rank in [Some(1), Some(2), Some(5), None] {
            tally.add(&CUTOFFS, rank);
        }
        let metrics = tally.metrics(&CUTOFFS);
        assert_eq!(metrics.recall, [0.25, 0.5, 0.5]);
        let second = 1.0 / 3f64.log2();
        assert_eq!(metrics.ndcg, [0.25, (1.0 + second) / 4.0, (1.0 + second) / 4.0]);
        let written = serde_json::to_value(&metrics).expect("numbers");
        assert_eq!(written["recall_at_2"], 0.5);
        assert_eq!(tally.requests(), 4);
    }
}
