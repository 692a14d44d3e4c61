//! Plans of matrix products that are kept: the latest used, and those that somebody holds.

use std::hash::Hash;
use std::sync::Arc;

use lru::LruCache;

/// Plans by shape. Beyond `most`, the one that was used longest ago is evicted, but none that is
/// held elsewhere: by a graph that was captured with it.
pub(super) struct Plans<S: Hash + Eq, P> {
    most: usize,
    plans: LruCache<S, Arc<P>>,
}

impl<S: Hash + Eq, P> Plans<S, P> {
    pub fn new(most: usize) -> Plans<S, P> {
        Plans { most, plans: LruCache::unbounded() }
    }

    pub fn get(&mut self, shape: &S) -> Option<Arc<P>> {
        self.plans.get(shape).map(Arc::clone)
    }

    /// Adds or replaces the plan of a shape.
    pub fn insert(&mut self, shape: S, plan: P) -> Arc<P> {
        let plan = Arc::new(plan);
        self.plans.put(shape, Arc::clone(&plan));
        // Held plans are passed over once: all of them may be held.
        for _ in 0..self.plans.len() {
            if self.plans.len() <= self.most {
                break;
            }
            let (shape, oldest) = self.plans.pop_lru().expect("there are more than `most`");
            if Arc::strong_count(&oldest) > 1 {
                self.plans.put(shape, oldest);
            }
        }
        plan
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_plan_used_longest_ago_is_evicted() {
        let mut plans = Plans::new(2);
        plans.insert(1, "one");
        plans.insert(2, "two");
        assert_eq!(plans.get(&1).as_deref(), Some(&"one"));
        plans.insert(3, "three");
        assert_eq!(plans.get(&2), None);
        assert_eq!(plans.get(&1).as_deref(), Some(&"one"));
        assert_eq!(plans.get(&3).as_deref(), Some(&"three"));
    }

    #[test]
    fn a_plan_that_a_graph_holds_is_not_evicted_until_the_graph_is_gone() {
        let mut plans = Plans::new(3);
        let held = [plans.insert(0, 0), plans.insert(1, 1)];
        for shape in 2..100 {
            plans.insert(shape, shape);
        }
        assert_eq!((plans.get(&0).as_deref(), plans.get(&1).as_deref()), (Some(&0), Some(&1)));
        assert_eq!(plans.plans.len(), 3);
        drop(held);
        for shape in 100..104 {
            plans.insert(shape, shape);
        }
        assert_eq!((plans.get(&0), plans.get(&1)), (None, None));
        assert_eq!(plans.plans.len(), 3);
    }

    #[test]
    fn more_plans_than_the_limit_are_kept_where_all_are_held() {
        let mut plans = Plans::new(2);
        let held: Vec<_> = (0..10).map(|shape| plans.insert(shape, shape)).collect();
        assert!((0..10).all(|shape| plans.get(&shape).is_some()));
        drop(held);
        plans.insert(10, 10);
        assert_eq!(plans.plans.len(), 2);
    }
}
