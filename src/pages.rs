//! Who has which page of memory.
//!
//! KV lives in pages that a device takes once: those of **contexts** hold [`PAGE_LEN`] tokens each,
//! those of **tails** [`TAIL_PAGE_LEN`] rows (a beam's KV at one position). Here are only their
//! indices. A page is taken while somebody holds its [`Page`], and free when the last holder drops
//! it: the memory of a request that ends, fails or is cancelled cannot be forgotten.

use std::sync::{Arc, Mutex};

/// Tokens of a context's page.
pub const PAGE_LEN: usize = 64;
/// Rows of a tail's page.
pub const TAIL_PAGE_LEN: usize = 16;

/// Pages that a pool can have.
pub const MAX_PAGES: usize = 1 << 24;

/// A fixed number of pages.
#[derive(Debug, Clone)]
pub struct Pool {
    /// Those that are free; the one that was given back last is taken first.
    free: Arc<Mutex<Vec<u32>>>,
    num_pages: usize,
}

/// A page that is taken. Clones hold the same page: a context that several requests have in common.
#[derive(Debug, Clone)]
pub struct Page(Arc<Lease>);

#[derive(Debug)]
struct Lease {
    index: u32,
    pool: Arc<Mutex<Vec<u32>>>,
}

impl Pool {
    /// A pool with all pages free.
    pub fn new(num_pages: usize) -> Pool {
        let free = (0..num_pages as u32).rev().collect();
        Pool { free: Arc::new(Mutex::new(free)), num_pages }
    }

    /// All pages, free or not.
    pub fn num_pages(&self) -> usize {
        self.num_pages
    }

    /// Pages that nobody holds.
    pub fn num_free(&self) -> usize {
        self.free.lock().expect("no holder panics").len()
    }

    /// The free pages.
    pub fn free_pages(&self) -> Vec<u32> {
        self.free.lock().expect("no holder panics").clone()
    }

    /// Takes pages, all or none.
    pub fn take(&self, count: usize) -> Option<Vec<Page>> {
        let mut free = self.free.lock().expect("no holder panics");
        let rest = free.len().checked_sub(count)?;
        let lease = |index| Page(Arc::new(Lease { index, pool: Arc::clone(&self.free) }));
        Some(free.drain(rest..).rev().map(lease).collect())
    }
}

impl Page {
    /// Which page it is.
    pub fn index(&self) -> u32 {
        self.0.index
    }

    /// Whether nobody else holds it.
    pub fn is_unshared(&self) -> bool {
        Arc::strong_count(&self.0) == 1
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        self.pool.lock().expect("no holder panics").push(self.index);
    }
}

/// Pages that a context of so many tokens takes.
pub fn context_pages(tokens: usize) -> usize {
    tokens.div_ceil(PAGE_LEN)
}

/// Pages that the tails of a search take whose beams are so many, position by position.
pub fn tail_pages(beams: impl IntoIterator<Item = usize>) -> usize {
    beams.into_iter().map(|beams| beams.div_ceil(TAIL_PAGE_LEN)).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_page_is_free_when_its_last_holder_drops_it() {
        let pool = Pool::new(3);
        let mut pages = pool.take(2).expect("three are free");
        assert_eq!([pages[0].index(), pages[1].index()], [0, 1]);
        assert!(pool.take(2).is_none(), "one is free");
        assert_eq!(pool.num_free(), 1, "what failed took none");
        let shared = pages[0].clone();
        assert!(!shared.is_unshared());
        pages.clear();
        assert_eq!(pool.num_free(), 2);
        assert!(shared.is_unshared());
        drop(shared);
        let mut free = pool.free_pages();
        free.sort_unstable();
        assert_eq!(free, [0, 1, 2]);
    }

    #[test]
    fn pages_are_counted_position_by_position() {
        assert_eq!([0, 1, 64, 65].map(context_pages), [0, 1, 1, 2]);
        assert_eq!(tail_pages([1, 16, 17, 0]), 1 + 1 + 2);
    }
}
