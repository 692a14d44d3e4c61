//! What was worked out for filters, by their texts: bounded in bytes, the least recently used go
//! first.

use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use lru::LruCache;

use crate::error::Result;

/// Bytes that an entry takes beside its text and its value: nodes of the list and of the map.
const ENTRY_BYTES: usize = 256;
/// Entries of a cache, however small.
const MAX_ENTRIES: usize = 4096;

/// Values by the text of their filter.
///
/// A value is worked out outside of the lock. Threads that ask for the same new filter wait for the
/// one that works it out; nobody else waits.
pub(super) struct FilterCache<V> {
    entries: Mutex<Entries<V>>,
    max_bytes: usize,
}

struct Entries<V> {
    by_text: LruCache<Arc<str>, Entry<V>>,
    /// Of all entries.
    bytes: usize,
}

/// A value, or the place where one will be.
type Place<V> = Arc<OnceLock<Result<Arc<V>>>>;

struct Entry<V> {
    version: u64,
    place: Place<V>,
    bytes: usize,
}

impl<V> FilterCache<V> {
    /// An empty cache; texts and values take at most `max_bytes`.
    pub fn new(max_bytes: usize) -> FilterCache<V> {
        let entries = Entries { by_text: LruCache::unbounded(), bytes: 0 };
        FilterCache { entries: Mutex::new(entries), max_bytes }
    }

    /// The value of a filter's text. `make` works it out and says how many bytes it takes, where the
    /// cache has none of this version.
    ///
    /// # Errors
    /// Those of `make`, which are not cached.
    pub fn get_or_make(
        &self,
        version: u64,
        text: &str,
        make: impl FnOnce() -> Result<(V, usize)>,
    ) -> Result<Arc<V>> {
        let place = self.place(version, text);
        let mut made = None;
        let value = place.get_or_init(|| {
            let (value, bytes) = make()?;
            made = Some(bytes);
            Ok(Arc::new(value))
        });
        match (made, value) {
            (Some(bytes), _) => self.count(text, &place, bytes),
            (None, Err(_)) => self.remove(text, &place),
            (None, Ok(_)) => {}
        }
        value.clone()
    }

    /// The texts, least recently used first.
    pub fn texts(&self) -> Vec<Arc<str>> {
        self.lock().by_text.iter().rev().map(|(text, _)| Arc::clone(text)).collect()
    }

    fn place(&self, version: u64, text: &str) -> Place<V> {
        let mut entries = self.lock();
        if let Some(entry) = entries.by_text.get(text)
            && entry.version == version
        {
            return Arc::clone(&entry.place);
        }
        let (place, bytes) = (Place::default(), text.len() + ENTRY_BYTES);
        entries.bytes += bytes;
        let entry = Entry { version, place: Arc::clone(&place), bytes };
        if let Some((_, before)) = entries.by_text.push(text.into(), entry) {
            entries.bytes -= before.bytes;
        }
        entries.evict(self.max_bytes);
        place
    }

    /// Counts the bytes of a value that was worked out, unless its place was evicted meanwhile.
    fn count(&self, text: &str, place: &Place<V>, bytes: usize) {
        let mut entries = self.lock();
        let entry = entries.by_text.peek_mut(text);
        if let Some(entry) = entry.filter(|entry| Arc::ptr_eq(&entry.place, place)) {
            entry.bytes += bytes;
            entries.bytes += bytes;
            entries.evict(self.max_bytes);
        }
    }

    fn remove(&self, text: &str, place: &Place<V>) {
        let mut entries = self.lock();
        let is_here = |entry: &Entry<V>| Arc::ptr_eq(&entry.place, place);
        if entries.by_text.peek(text).is_some_and(is_here)
            && let Some(entry) = entries.by_text.pop(text)
        {
            entries.bytes -= entry.bytes;
        }
    }

    /// No code of others runs under the lock, and each of its holders leaves the entries whole.
    fn lock(&self) -> MutexGuard<'_, Entries<V>> {
        self.entries.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<V> Entries<V> {
    /// Drops the least recently used entries, the newest excepted, until the rest fits.
    fn evict(&mut self, max_bytes: usize) {
        while (self.bytes > max_bytes || self.by_text.len() > MAX_ENTRIES) && self.by_text.len() > 1
        {
            let Some((_, oldest)) = self.by_text.pop_lru() else { return };
            self.bytes -= oldest.bytes;
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Barrier;
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;
    use crate::error::Error;

    fn bytes(cache: &FilterCache<Vec<u8>>) -> usize {
        let entries = cache.lock();
        let counted = entries.by_text.iter().map(|(_, entry)| entry.bytes).sum::<usize>();
        assert_eq!(counted, entries.bytes, "what is counted is what is there");
        counted
    }

    #[test]
    fn texts_and_values_stay_within_the_bytes_and_the_newest_stay() {
        let cache: FilterCache<Vec<u8>> = FilterCache::new(1 << 20);
        let text = |number: usize| format!("{number:0>20000}");
        for number in 0..200 {
            let value = cache.get_or_make(0, &text(number), || Ok((vec![1; 5000], 5000)));
            assert_eq!(value.expect("it is made").len(), 5000);
            assert!(bytes(&cache) <= 1 << 20);
        }
        let texts = cache.texts();
        assert_eq!(texts.len(), (1 << 20) / (20_000 + 5000 + ENTRY_BYTES));
        assert_eq!(&*texts[texts.len() - 1], text(199));
        let again = cache.get_or_make(0, &text(199), || panic!("it is cached"));
        again.expect("it was made");
        // One that is larger than all is used all the same.
        let large = cache.get_or_make(0, "large", || Ok((Vec::new(), 1 << 30)));
        assert!(large.is_ok() && cache.texts().len() == 1);
    }

    #[test]
    fn another_version_and_an_error_are_made_anew() {
        let cache: FilterCache<Vec<u8>> = FilterCache::new(1 << 20);
        let make = |version, byte| {
            let value = cache.get_or_make(version, "a", || Ok((vec![byte], 1)));
            value.expect("it is made")[0]
        };
        assert_eq!([make(1, 10), make(1, 11), make(2, 12), make(2, 13)], [10, 10, 12, 12]);
        assert_eq!(cache.texts().len(), 1);
        let failed = cache.get_or_make(0, "b", || Err(Error::EmptyInput));
        assert!(matches!(failed, Err(Error::EmptyInput)));
        assert!(cache.get_or_make(0, "b", || Ok((vec![1], 1))).is_ok());
        bytes(&cache);
    }

    #[test]
    fn many_threads_work_a_filter_out_once_and_other_filters_do_not_wait() {
        let cache: FilterCache<Vec<u8>> = FilterCache::new(1 << 20);
        let (count, start, inside) = (AtomicUsize::new(0), Barrier::new(4), Barrier::new(2));
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    start.wait();
                    let value = cache.get_or_make(0, "slow", || {
                        count.fetch_add(1, Ordering::Relaxed);
                        inside.wait();
                        Ok((vec![7], 1))
                    });
                    assert_eq!(*value.expect("it is made"), [7]);
                });
            }
            // The slow one is not done before this one is.
            let other = cache.get_or_make(0, "quick", || Ok((vec![8], 1)));
            assert_eq!(*other.expect("it is made"), [8]);
            inside.wait();
        });
        assert_eq!(count.into_inner(), 1);
    }

    #[test]
    fn a_panic_while_a_value_is_worked_out_harms_nobody_else() {
        let cache: FilterCache<Vec<u8>> = FilterCache::new(1 << 20);
        let panicked = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            cache.get_or_make(0, "a", || std::panic::resume_unwind(Box::new("on purpose")))
        }));
        assert!(panicked.is_err());
        assert!(cache.get_or_make(0, "a", || Ok((vec![1], 1))).is_ok());
    }
}
