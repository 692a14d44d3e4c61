//! A bounded queue from any number of threads to the one that works.
//!
//! Nothing is known here of what is queued. What must hold, and is checked by a test that goes
//! through the interleavings: an entry that was taken in reaches the thread that works; after the
//! end none is taken in; a thread that waits is woken.

use std::time::Duration;

use super::sync::{Condvar, Mutex};

/// Entries of type `T`, and the IDs of those that were cancelled.
pub struct Queue<T> {
    state: Mutex<State<T>>,
    /// Something came for the thread that works.
    filled: Condvar,
    /// There may be room again.
    drained: Condvar,
    bounds: Bounds,
}

/// How much may wait.
#[derive(Debug, Clone, Copy)]
pub struct Bounds {
    /// Entries, at least one.
    pub entries: usize,
    /// How long an entry is expected to wait, in microseconds. The first is taken in any case.
    pub wait_us: u64,
}

impl Bounds {
    /// So many entries, and none that waits longer where that is bounded.
    pub fn new(entries: usize, wait: Option<Duration>) -> Bounds {
        let us = |wait: Duration| u64::try_from(wait.as_micros()).unwrap_or(u64::MAX);
        Bounds { entries, wait_us: wait.map_or(u64::MAX, us) }
    }
}

/// What waits, as far as the thread that works knows.
#[derive(Debug, Clone, Copy, Default)]
pub struct Backlog {
    /// Entries that were taken but wait still.
    pub entries: usize,
    /// How long one that comes now is expected to wait, in microseconds.
    pub wait_us: u64,
    /// How much longer it waits for each entry that came before it meanwhile.
    pub each_us: u64,
}

struct State<T> {
    entries: Vec<T>,
    /// Entries that count towards the bounds.
    num_counted: usize,
    /// What the thread that works last said.
    backlog: Backlog,
    cancelled: Vec<u64>,
    is_closed: bool,
}

/// Why an entry is not taken in. It comes back with the reason.
#[derive(Debug)]
pub enum PushError<T> {
    /// So many wait already, or for so long.
    Full {
        /// The entry.
        entry: T,
        /// What waits.
        backlog: Backlog,
    },
    /// No entry is taken in any more.
    Closed(T),
}

/// What came since the last time.
pub struct Taken<T> {
    /// In the order in which they came.
    pub entries: Vec<T>,
    /// IDs that were cancelled, of entries in `entries` or of earlier ones.
    pub cancelled: Vec<u64>,
    /// No entry will come any more.
    pub is_closed: bool,
}

impl<T> Queue<T> {
    /// A queue that refuses entries beyond its bounds.
    pub fn new(bounds: Bounds) -> Queue<T> {
        let state = State {
            entries: Vec::new(),
            num_counted: 0,
            backlog: Backlog::default(),
            cancelled: Vec::new(),
            is_closed: false,
        };
        let (filled, drained) = (Condvar::new(), Condvar::new());
        Queue { state: Mutex::new(state), filled, drained, bounds }
    }

    /// Hands over an entry.
    ///
    /// # Errors
    /// The entry, where there is no room for it.
    pub fn push(&self, entry: T) -> Result<(), PushError<T>> {
        let mut state = self.state.lock().expect("no holder panics");
        if state.is_closed {
            return Err(PushError::Closed(entry));
        }
        if state.is_full(&self.bounds) {
            return Err(PushError::Full { entry, backlog: state.backlog() });
        }
        state.entries.push(entry);
        state.num_counted += 1;
        drop(state);
        self.filled.notify_one();
        Ok(())
    }

    /// Hands over several entries at once, as far as there is room; those that are left come back
    /// with what waits.
    ///
    /// # Errors
    /// All entries, where the queue is closed.
    pub fn push_all(&self, entries: Vec<T>) -> Result<(Vec<T>, Backlog), Vec<T>> {
        let mut state = self.state.lock().expect("no holder panics");
        if state.is_closed {
            return Err(entries);
        }
        let mut entries = entries.into_iter();
        while !state.is_full(&self.bounds)
            && let Some(entry) = entries.next()
        {
            state.entries.push(entry);
            state.num_counted += 1;
        }
        let backlog = state.backlog();
        drop(state);
        self.filled.notify_one();
        Ok((entries.collect(), backlog))
    }

    /// Hands over an entry, after waiting for room.
    ///
    /// # Errors
    /// The entry, where the queue is closed.
    pub fn push_wait(&self, entry: T) -> Result<(), T> {
        let mut state = self.state.lock().expect("no holder panics");
        while !state.is_closed && state.is_full(&self.bounds) {
            state = self.drained.wait(state).expect("no holder panics");
        }
        if state.is_closed {
            return Err(entry);
        }
        state.entries.push(entry);
        state.num_counted += 1;
        drop(state);
        self.filled.notify_one();
        Ok(())
    }

    /// Hands over an entry that counts towards no limit.
    ///
    /// # Errors
    /// The entry, where the queue is closed.
    pub fn push_uncounted(&self, entry: T) -> Result<(), T> {
        let mut state = self.state.lock().expect("no holder panics");
        if state.is_closed {
            return Err(entry);
        }
        state.entries.push(entry);
        drop(state);
        self.filled.notify_one();
        Ok(())
    }

    /// Tells the thread that works that an entry's answer is not wanted any more.
    pub fn cancel(&self, id: u64) {
        self.state.lock().expect("no holder panics").cancelled.push(id);
    }

    /// What came, for the thread that works, which says what waits still of what it took; while it
    /// is idle it waits here until something comes.
    pub fn take(&self, backlog: Backlog, is_idle: bool) -> Taken<T> {
        let mut state = self.state.lock().expect("no holder panics");
        state.backlog = backlog;
        if !state.is_full(&self.bounds) {
            self.drained.notify_all();
        }
        while is_idle && state.entries.is_empty() && !state.is_closed {
            state = self.filled.wait(state).expect("no holder panics");
        }
        // They wait until the thread that works says otherwise.
        state.backlog = state.backlog();
        state.num_counted = 0;
        Taken {
            entries: std::mem::take(&mut state.entries),
            cancelled: std::mem::take(&mut state.cancelled),
            is_closed: state.is_closed,
        }
    }

    /// Takes no entry in any more.
    pub fn close(&self) {
        self.state.lock().expect("no holder panics").is_closed = true;
        self.filled.notify_one();
        self.drained.notify_all();
    }

    /// Whether entries are taken in.
    pub fn is_open(&self) -> bool {
        !self.state.lock().expect("no holder panics").is_closed
    }

    /// Entries that wait.
    pub fn queued(&self) -> usize {
        self.state.lock().expect("no holder panics").backlog().entries
    }
}

impl<T> State<T> {
    /// What waits, with the entries that came since the thread that works said so.
    fn backlog(&self) -> Backlog {
        let Backlog { entries, wait_us, each_us } = self.backlog;
        let came = each_us.saturating_mul(self.num_counted as u64);
        Backlog {
            entries: entries + self.num_counted,
            wait_us: wait_us.saturating_add(came),
            each_us,
        }
    }

    fn is_full(&self, bounds: &Bounds) -> bool {
        let Backlog { entries, wait_us, .. } = self.backlog();
        entries >= bounds.entries || (entries > 0 && wait_us > bounds.wait_us)
    }
}
