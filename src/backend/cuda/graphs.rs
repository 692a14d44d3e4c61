//! Captured steps: which shapes of steps are run eagerly, captured, or replayed.

use std::hash::Hash;
use std::num::NonZeroUsize;
use std::sync::{Mutex, MutexGuard};

use lru::LruCache;

use super::device::{Device, Graph, Interruption};
use super::driver::Driver;

/// Graphs that are kept: the latest used.
const MAX_GRAPHS: NonZeroUsize = NonZeroUsize::new(256).expect("not zero");
/// Eager runs of a step shape before it is captured: a shape that comes rarely does not pay for it,
/// and all memory has its size by then.
const WARM_UP_RUNS: u32 = 2;

/// Graphs by a key that says everything about a step that a graph holds.
pub(super) struct Graphs<K: Hash + Eq, D: Driver> {
    state: Mutex<State<K, D>>,
}

struct State<K: Hash + Eq, D: Driver> {
    steps: LruCache<K, Step<D>>,
    /// Releases of memory up to which the graphs are valid.
    num_releases: u64,
}

/// A step shape that came up before.
enum Step<D: Driver> {
    /// It was run eagerly so many times.
    WarmUp(u32),
    Captured(Graph<D>),
    /// The device refused to capture it.
    NeverCapture,
}

impl<K: Hash + Eq, D: Driver> Graphs<K, D> {
    pub fn new() -> Graphs<K, D> {
        let state = State { steps: LruCache::new(MAX_GRAPHS), num_releases: 0 };
        Graphs { state: Mutex::new(state) }
    }

    /// The state, without graphs that may refer to memory which was given back.
    fn state(&self, device: &Device<D>) -> MutexGuard<'_, State<K, D>> {
        let mut state = self.state.lock().expect("no holder panics");
        let releases = device.num_releases();
        if state.num_releases != releases {
            state.drop_graphs();
            state.num_releases = releases;
        }
        state
    }

    /// Runs a step: replays its graph, or captures one and replays that, or calls `work`, which
    /// launches the step's kernels. Where a capture fails, `work` is called again.
    pub fn run(&self, device: &Device<D>, key: K, mut work: impl FnMut()) {
        let step = self.state(device).steps.pop(&key);
        let step = match step {
            Some(Step::Captured(graph)) => Step::Captured(graph),
            Some(Step::WarmUp(WARM_UP_RUNS)) => match device.capture_step(&mut work) {
                Ok(graph) => Step::Captured(graph),
                Err(Interruption::Refused) => Step::NeverCapture,
                Err(Interruption::Incomplete) => Step::WarmUp(0),
                Err(Interruption::OutOfMemory) => {
                    self.state(device).drop_graphs();
                    Step::WarmUp(0)
                }
            },
            Some(Step::NeverCapture) => Step::NeverCapture,
            Some(Step::WarmUp(runs)) => Step::WarmUp(runs + 1),
            None => Step::WarmUp(1),
        };
        match &step {
            Step::Captured(graph) => device.replay(graph),
            Step::WarmUp(_) | Step::NeverCapture => work(),
        }
        // What this step grew, other graphs may refer to; its own was captured after that.
        let mut state = self.state(device);
        // A step that failed has not taken all memory that it needs.
        if device.check().is_ok()
            && let Some((_, Step::Captured(_))) = state.steps.push(key, step)
        {
            device.note_evicted_graphs(1);
        }
    }
}

impl<K: Hash + Eq, D: Driver> State<K, D> {
    /// Shapes that are never captured stay so.
    fn drop_graphs(&mut self) {
        let steps = std::mem::replace(&mut self.steps, LruCache::new(MAX_GRAPHS));
        // The oldest come last.
        let mut never: Vec<K> = steps
            .into_iter()
            .filter_map(|(key, step)| matches!(step, Step::NeverCapture).then_some(key))
            .collect();
        while let Some(key) = never.pop() {
            self.steps.put(key, Step::NeverCapture);
        }
    }
}
