//! A bounded queue from any number of threads to the one that works.
//!
//! Nothing is known here of what is queued. What must hold, and is checked by a test that goes
//! through the interleavings: an entry that was taken in reaches the thread that works; after the
//! end none is taken in; a thread that waits is woken.

use super::sync::{Condvar, Mutex};

/// Entries of type `T`, and the IDs of those that were cancelled.
pub struct Queue<T> {
    state: Mutex<State<T>>,
    /// Something came for the thread that works.
    filled: Condvar,
    /// There may be room again.
    drained: Condvar,
    limit: usize,
}

struct State<T> {
    entries: Vec<T>,
    /// Entries that count towards the limit.
    num_counted: usize,
    /// Entries that were taken but wait still, as the thread that works last said.
    num_waiting: usize,
    cancelled: Vec<u64>,
    is_closed: bool,
}

/// Why an entry is not taken in. It comes back with the reason.
#[derive(Debug)]
pub enum PushError<T> {
    /// So many wait already.
    Full {
        /// The entry.
        entry: T,
        /// Entries that wait.
        queued: usize,
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
    /// A queue that refuses entries while `limit` of them wait.
    pub fn new(limit: usize) -> Queue<T> {
        let state = State {
            entries: Vec::new(),
            num_counted: 0,
            num_waiting: 0,
            cancelled: Vec::new(),
            is_closed: false,
        };
        let (filled, drained) = (Condvar::new(), Condvar::new());
        Queue { state: Mutex::new(state), filled, drained, limit }
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
        let queued = state.queued();
        if queued >= self.limit {
            return Err(PushError::Full { entry, queued });
        }
        state.entries.push(entry);
        state.num_counted += 1;
        drop(state);
        self.filled.notify_one();
        Ok(())
    }

    /// Hands over several entries at once, as far as there is room; those that are left come back
    /// with the number of entries that wait.
    ///
    /// # Errors
    /// All entries, where the queue is closed.
    pub fn push_all(&self, mut entries: Vec<T>) -> Result<(Vec<T>, usize), Vec<T>> {
        let mut state = self.state.lock().expect("no holder panics");
        if state.is_closed {
            return Err(entries);
        }
        let room = self.limit.saturating_sub(state.queued()).min(entries.len());
        let rest = entries.split_off(room);
        state.entries.append(&mut entries);
        state.num_counted += room;
        let queued = state.queued();
        drop(state);
        self.filled.notify_one();
        Ok((rest, queued))
    }

    /// Hands over an entry, after waiting for room.
    ///
    /// # Errors
    /// The entry, where the queue is closed.
    pub fn push_wait(&self, entry: T) -> Result<(), T> {
        let mut state = self.state.lock().expect("no holder panics");
        while !state.is_closed && state.queued() >= self.limit {
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

    /// What came, for the thread that works, which says how many of the entries that it took wait
    /// still; while it is idle it waits here until something comes.
    pub fn take(&self, num_waiting: usize, is_idle: bool) -> Taken<T> {
        let mut state = self.state.lock().expect("no holder panics");
        state.num_waiting = num_waiting;
        if state.queued() < self.limit {
            self.drained.notify_all();
        }
        while is_idle && state.entries.is_empty() && !state.is_closed {
            state = self.filled.wait(state).expect("no holder panics");
        }
        // They wait until the thread that works says otherwise.
        state.num_waiting += std::mem::take(&mut state.num_counted);
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

    /// Entries that wait.
    pub fn queued(&self) -> usize {
        self.state.lock().expect("no holder panics").queued()
    }
}

impl<T> State<T> {
    fn queued(&self) -> usize {
        self.num_counted + self.num_waiting
    }
}
