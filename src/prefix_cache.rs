//! Contexts that were computed already, by their tokens.
//!
//! A context's page depends on its own tokens and all before them. So pages are kept in a tree: a
//! page under the one before it, found by the page's tokens themselves; no two contexts can be
//! taken for each other. A prompt goes down the tree as far as it agrees, and only the rest is
//! computed. Its last token always is, because its row is what the first step is scored by.
//!
//! Pages in the tree are full and never written again. The last page of a context is seldom full;
//! it can be kept for its **user**, who is likely to come back with a little more. It is given
//! away when the user comes (it is then written on), so it is used by one request at a time.
//!
//! An encoder's context depends on all tokens at once: it is kept, found and dropped as a whole.
//!
//! What was not used for longest goes first, leaves before what they stand on. What a request that
//! waits will find is **pinned**: it stays for as long as anything else can go.

use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;

use crate::pages::{PAGE_LEN, Page};

/// How often requests found their context, and how much of it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct CacheStats {
    /// Requests that found some.
    pub hits: u64,
    /// Requests that found none.
    pub misses: u64,
    /// Tokens that were found.
    pub hit_tokens: u64,
    /// Tokens that were asked for.
    pub tokens: u64,
    /// Pages that were dropped to make room.
    pub evicted_pages: u64,
}

/// A context that begins with pages from the cache.
#[derive(Debug, Default)]
pub struct Found {
    /// Full pages, shared; behind them the user's own last page, if it was found.
    pub pages: Vec<Page>,
    /// Tokens that need not be read.
    pub tokens: usize,
}

/// What the cache has of the prompt of a request that waits. It is not evicted until it is unpinned.
#[derive(Debug, Default)]
pub struct Pin {
    /// Tokens that need not be read.
    pub tokens: usize,
    /// The last full page, or the whole context; what it stands on stays with it.
    entry: Option<EntryId>,
    /// The user whose last page it is, and when that was kept.
    tail: Option<(String, u64)>,
}

/// Pages of finished contexts.
#[derive(Debug, Default)]
pub struct PrefixCache {
    entries: HashMap<Key, Entry>,
    keys: HashMap<EntryId, Key>,
    /// What can be dropped, least recently used first.
    droppable: BTreeSet<(u64, EntryId)>,
    users: HashMap<String, UserTail>,
    /// Last pages by use.
    user_order: BTreeSet<(u64, String)>,
    next_id: EntryId,
    clock: u64,
    num_pages: usize,
    stats: CacheStats,
}

type EntryId = u64;
const ROOT: EntryId = 0;

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct Key {
    parent: EntryId,
    /// A page's tokens, or a whole context's.
    tokens: Arc<[u32]>,
}

#[derive(Debug)]
struct Entry {
    id: EntryId,
    pages: Vec<Page>,
    num_children: usize,
    num_pins: usize,
    used: u64,
}

impl Entry {
    fn is_droppable(&self) -> bool {
        self.num_children + self.num_pins == 0
    }
}

/// The last page of a user's last context.
#[derive(Debug)]
struct UserTail {
    /// The full page before it.
    parent: EntryId,
    tokens: Vec<u32>,
    page: Page,
    num_pins: usize,
    /// When it was kept, which no two were at once.
    used: u64,
}

impl PrefixCache {
    /// Pages that the cache holds.
    pub fn num_pages(&self) -> usize {
        self.num_pages
    }

    /// The pages that the cache holds.
    pub fn pages(&self) -> impl Iterator<Item = &Page> {
        let of_entries = self.entries.values().flat_map(|entry| &entry.pages);
        of_entries.chain(self.users.values().map(|tail| &tail.page))
    }

    /// Since the beginning.
    pub fn stats(&self) -> CacheStats {
        self.stats
    }

    /// Pages that would be free if the cache dropped all it has: those that no request holds.
    pub fn num_unshared(&self) -> usize {
        let unshared = |pages: &[Page]| pages.iter().filter(|page| page.is_unshared()).count();
        self.entries.values().map(|entry| unshared(&entry.pages)).sum::<usize>()
            + self.users.values().filter(|tail| tail.page.is_unshared()).count()
    }

    /// The longest part of a prompt that is there, of a network that reads from left to right.
    pub fn match_prefix(&mut self, tokens: &[u32], user: Option<&str>) -> Found {
        let (mut found, parent) = self.full_pages(tokens);
        if let Some(tail) = user.and_then(|user| self.take_tail(user)) {
            let common = tail.common_tokens(parent, found.tokens, tokens);
            // A page that a request is still reading must not be written.
            if common > 0 && tail.page.is_unshared() {
                found.tokens += common;
                found.pages.push(tail.page);
            }
        }
        self.count(&found, tokens.len());
        found
    }

    /// The full pages that a prompt begins with, without its last token, and the last of them.
    fn full_pages(&mut self, tokens: &[u32]) -> (Found, EntryId) {
        let (mut found, mut parent) = (Found::default(), ROOT);
        let most = tokens.len().saturating_sub(1);
        for page in tokens[..most].chunks_exact(PAGE_LEN) {
            let Some(entry) = self.touch(&Key { parent, tokens: page.into() }) else { break };
            parent = entry.id;
            found.pages.extend_from_slice(&entry.pages);
            found.tokens += PAGE_LEN;
        }
        (found, parent)
    }

    /// Keeps what [`match_prefix`](PrefixCache::match_prefix) would find from being evicted.
    pub fn pin_prefix(&mut self, tokens: &[u32], user: Option<&str>) -> Pin {
        let (Found { tokens: mut num_tokens, .. }, parent) = self.full_pages(tokens);
        let mut pin = Pin::default();
        if parent != ROOT {
            self.pin_entry(parent);
            pin.entry = Some(parent);
        }
        if let Some((user, tail)) = user.and_then(|user| Some((user, self.users.get_mut(user)?))) {
            let common = tail.common_tokens(parent, num_tokens, tokens);
            if common > 0 {
                num_tokens += common;
                tail.num_pins += 1;
                pin.tail = Some((user.to_string(), tail.used));
                self.user_order.remove(&(tail.used, user.to_string()));
            }
        }
        Pin { tokens: num_tokens, ..pin }
    }

    /// Keeps what [`match_whole`](PrefixCache::match_whole) would find from being evicted.
    pub fn pin_whole(&mut self, tokens: &[u32]) -> Pin {
        let key = Key { parent: ROOT, tokens: tokens.into() };
        let Some(id) = self.touch(&key).map(|entry| entry.id) else { return Pin::default() };
        self.pin_entry(id);
        Pin { tokens: tokens.len(), entry: Some(id), tail: None }
    }

    fn pin_entry(&mut self, id: EntryId) {
        let key = self.keys.get(&id).expect("found just now");
        let entry = self.entries.get_mut(key).expect("keys have entries");
        entry.num_pins += 1;
        self.droppable.remove(&(entry.used, id));
    }

    /// Lets go of what a request would have found, or finds now.
    pub fn unpin(&mut self, pin: Pin) {
        // Where the cache was cleared meanwhile, there is nothing left to let go of.
        if let Some(key) = pin.entry.and_then(|id| self.keys.get(&id)) {
            let entry = self.entries.get_mut(key).expect("keys have entries");
            entry.num_pins -= 1;
            if entry.is_droppable() {
                self.droppable.insert((entry.used, entry.id));
            }
        }
        let Some((user, kept)) = pin.tail else { return };
        if let Some(tail) = self.users.get_mut(&user).filter(|tail| tail.used == kept) {
            tail.num_pins -= 1;
            if tail.num_pins == 0 {
                self.user_order.insert((kept, user));
            }
        }
    }

    /// The context of a prompt that an encoder has read, if it is there.
    pub fn match_whole(&mut self, tokens: &[u32]) -> Found {
        let key = Key { parent: ROOT, tokens: tokens.into() };
        let pages = self.touch(&key).map(|entry| entry.pages.clone());
        let found = match pages {
            Some(pages) => Found { pages, tokens: tokens.len() },
            None => Found::default(),
        };
        self.count(&found, tokens.len());
        found
    }

    fn count(&mut self, found: &Found, tokens: usize) {
        match found.tokens {
            0 => self.stats.misses += 1,
            _ => self.stats.hits += 1,
        }
        self.stats.hit_tokens += found.tokens as u64;
        self.stats.tokens += tokens as u64;
    }

    /// Keeps the pages of a context that was read from left to right. The last one, where it is not
    /// full, is kept for the user alone.
    pub fn insert_prefix(&mut self, tokens: &[u32], pages: &[Page], user: Option<&str>) {
        let mut parent = ROOT;
        let mut full = tokens.chunks_exact(PAGE_LEN);
        for (tokens, page) in full.by_ref().zip(pages) {
            parent = self.keep(Key { parent, tokens: tokens.into() }, vec![page.clone()]);
        }
        let rest = full.remainder();
        if let (Some(user), Some(page), false) = (user, pages.last(), rest.is_empty()) {
            self.take_tail(user);
            self.clock += 1;
            let (page, tokens) = (page.clone(), rest.to_vec());
            let tail = UserTail { parent, tokens, page, num_pins: 0, used: self.clock };
            self.user_order.insert((self.clock, user.to_string()));
            self.users.insert(user.to_string(), tail);
            self.num_pages += 1;
        }
    }

    /// Keeps the context of a prompt that an encoder has read.
    pub fn insert_whole(&mut self, tokens: &[u32], pages: &[Page]) {
        self.keep(Key { parent: ROOT, tokens: tokens.into() }, pages.to_vec());
    }

    /// Drops what was not used for longest; its pages are free unless requests hold them. False when
    /// there is nothing left to drop but what is pinned.
    pub fn evict(&mut self) -> bool {
        let tail = self.user_order.first().map(|(used, _)| *used);
        let entry = self.droppable.first().map(|(used, _)| *used);
        match (tail, entry) {
            (None, None) => return false,
            (Some(tail), entry) if entry.is_none_or(|entry| tail < entry) => {
                let (_, user) = self.user_order.pop_first().expect("there is one");
                self.users.remove(&user);
                self.num_pages -= 1;
                self.stats.evicted_pages += 1;
            }
            _ => {
                let (_, id) = self.droppable.pop_first().expect("there is one");
                let key = self.keys.remove(&id).expect("entries have keys");
                let entry = self.entries.remove(&key).expect("keys have entries");
                self.num_pages -= entry.pages.len();
                self.stats.evicted_pages += entry.pages.len() as u64;
                self.release(key.parent);
            }
        }
        true
    }

    /// Drops everything: the weights are others.
    pub fn clear(&mut self) {
        let stats = self.stats;
        *self = PrefixCache { stats, next_id: self.next_id, ..PrefixCache::default() };
    }

    /// An entry, used now.
    fn touch(&mut self, key: &Key) -> Option<&Entry> {
        self.clock += 1;
        let entry = self.entries.get_mut(key)?;
        if entry.is_droppable() {
            self.droppable.remove(&(entry.used, entry.id));
            self.droppable.insert((self.clock, entry.id));
        }
        entry.used = self.clock;
        Some(entry)
    }

    fn keep(&mut self, key: Key, pages: Vec<Page>) -> EntryId {
        if let Some(entry) = self.touch(&key) {
            return entry.id; // the same, computed twice: the first stays
        }
        self.next_id += 1;
        let id = self.next_id;
        if let Some(parent) = self.keys.get(&key.parent) {
            let parent = self.entries.get_mut(parent).expect("keys have entries");
            parent.num_children += 1;
            self.droppable.remove(&(parent.used, parent.id));
        }
        self.num_pages += pages.len();
        self.droppable.insert((self.clock, id));
        self.keys.insert(id, key.clone());
        let used = self.clock;
        self.entries.insert(key, Entry { id, pages, num_children: 0, num_pins: 0, used });
        id
    }

    /// One child less.
    fn release(&mut self, parent: EntryId) {
        let Some(key) = self.keys.get(&parent) else { return };
        let entry = self.entries.get_mut(key).expect("keys have entries");
        entry.num_children -= 1;
        if entry.is_droppable() {
            self.droppable.insert((entry.used, entry.id));
        }
    }

    fn take_tail(&mut self, user: &str) -> Option<UserTail> {
        let tail = self.users.remove(user)?;
        self.user_order.remove(&(tail.used, user.to_string()));
        self.num_pages -= 1;
        Some(tail)
    }
}

impl UserTail {
    /// Tokens behind the `num_found` ones of a prompt's full pages that the page begins with.
    fn common_tokens(&self, parent: EntryId, num_found: usize, prompt: &[u32]) -> usize {
        let rest = &prompt[num_found..prompt.len().saturating_sub(1)];
        match self.parent == parent {
            true => self.tokens.iter().zip(rest).take_while(|(a, b)| a == b).count(),
            false => 0,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pages::{Pool, context_pages};

    fn read(pool: &Pool, cache: &mut PrefixCache, tokens: &[u32], user: Option<&str>) -> usize {
        let mut found = cache.match_prefix(tokens, user);
        let rest = context_pages(tokens.len()) - found.pages.len();
        while pool.num_free() < rest {
            assert!(cache.evict(), "nothing else holds pages");
        }
        found.pages.extend(pool.take(rest).expect("enough are free"));
        cache.insert_prefix(tokens, &found.pages, user);
        found.tokens
    }

    #[test]
    fn a_prompt_finds_the_pages_that_it_begins_with() {
        let (pool, mut cache) = (Pool::new(20), PrefixCache::default());
        let tokens: Vec<u32> = (0..200).collect();
        assert_eq!(read(&pool, &mut cache, &tokens, None), 0);
        assert_eq!(read(&pool, &mut cache, &tokens, None), 192);
        assert_eq!(read(&pool, &mut cache, &tokens[..192], None), 128, "the last token is read");
        assert_eq!(read(&pool, &mut cache, &tokens[..193], None), 192);
        let mut other = tokens.clone();
        other[70] = 1000;
        assert_eq!(read(&pool, &mut cache, &other, None), 64);
        // The same page behind another one is another context.
        assert_eq!(read(&pool, &mut cache, &tokens[64..], None), 0);
        assert_eq!(cache.stats().hits, 4);
        assert_eq!(cache.num_pages() + pool.num_free(), 20);
    }

    #[test]
    fn a_user_who_returns_pays_for_what_is_new() {
        let (pool, mut cache) = (Pool::new(20), PrefixCache::default());
        let mut tokens: Vec<u32> = (0..100).collect();
        read(&pool, &mut cache, &tokens, Some("ann"));
        tokens.extend(200..204);
        assert_eq!(read(&pool, &mut cache, &tokens, Some("ann")), 100);
        assert_eq!(read(&pool, &mut cache, &tokens, Some("bob")), 64, "the last page is ann's");
        tokens[102] = 7; // what was there is no longer so
        assert_eq!(read(&pool, &mut cache, &tokens, Some("ann")), 102);
        tokens[3] = 7;
        assert_eq!(read(&pool, &mut cache, &tokens, Some("ann")), 0);
        // A page that a request still reads is not written on.
        let held = cache.users["ann"].page.clone();
        tokens.push(5);
        assert_eq!(read(&pool, &mut cache, &tokens, Some("ann")), 64);
        drop(held);
    }

    #[test]
    fn what_was_not_used_for_longest_goes_first() {
        let (pool, mut cache) = (Pool::new(4), PrefixCache::default());
        let context = |first: u32| (first..first + 129).collect::<Vec<u32>>();
        read(&pool, &mut cache, &context(0), None);
        assert_eq!(
            (pool.num_free(), cache.num_pages()),
            (2, 2),
            "the page that is not full is free"
        );
        read(&pool, &mut cache, &context(1000), None);
        assert_eq!(cache.num_unshared(), 3);
        assert_eq!(read(&pool, &mut cache, &context(0), None), 64, "its leaf went first");
        cache.clear();
        assert_eq!((pool.num_free(), cache.num_pages()), (4, 0));
    }

    #[test]
    fn what_is_pinned_stays_until_it_is_unpinned() {
        let (pool, mut cache) = (Pool::new(6), PrefixCache::default());
        let context = |first: u32| (first..first + 100).collect::<Vec<u32>>();
        read(&pool, &mut cache, &context(0), Some("ann"));
        let pins =
            [cache.pin_prefix(&context(0), Some("ann")), cache.pin_prefix(&context(0), None)];
        assert_eq!([pins[0].tokens, pins[1].tokens], [99, 64]);
        for first in [1000, 2000, 3000, 4000] {
            read(&pool, &mut cache, &context(first), Some("bob"));
        }
        assert!(cache.stats().evicted_pages > 0);
        let all = std::iter::from_fn(|| cache.evict().then_some(())).count();
        assert!(all > 0 && cache.num_pages() == 2, "the pinned ones are left");
        let [first, second] = pins;
        cache.unpin(first);
        assert!(cache.evict(), "the last page");
        assert!(!cache.evict(), "the other is pinned twice");
        cache.unpin(second);
        assert!(cache.evict());
        assert_eq!((pool.num_free(), cache.num_pages()), (6, 0));

        // A pin outlives what it pinned: the user's page was replaced, the cache was cleared.
        read(&pool, &mut cache, &context(0), Some("ann"));
        let pin = cache.pin_prefix(&context(0), Some("ann"));
        read(&pool, &mut cache, &context(0), Some("ann"));
        cache.unpin(pin);
        let pins = [cache.pin_prefix(&context(0), Some("ann")), cache.pin_whole(&[1])];
        assert_eq!(pins[1].tokens, 0);
        cache.clear();
        read(&pool, &mut cache, &context(0), Some("ann"));
        pins.into_iter().for_each(|pin| cache.unpin(pin));
        while cache.evict() {}
        assert_eq!((pool.num_free(), cache.num_pages()), (6, 0));
    }

    #[test]
    fn an_encoders_context_is_found_whole() {
        let (pool, mut cache) = (Pool::new(4), PrefixCache::default());
        let tokens: Vec<u32> = (0..100).collect();
        cache.insert_whole(&tokens, &pool.take(2).expect("four are free"));
        assert_eq!(cache.match_whole(&tokens).tokens, 100);
        assert_eq!(cache.match_whole(&tokens[..99]).tokens, 0);
        assert!(cache.evict());
        assert!(!cache.evict());
        assert_eq!(pool.num_free(), 4);
    }
}
