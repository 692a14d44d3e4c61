//! Places in a ring of memory for copies that are on their way.

use std::collections::VecDeque;

/// Where a ring's bytes go, and what tells that they arrived.
pub(super) trait Copies {
    /// Tells that a copy, and all before it, arrived.
    type Ticket;
    /// Why the device did not do something.
    type Error;

    /// Writes `part` at `at` of the ring and enqueues its copy to `to` bytes behind the destination.
    fn copy(&self, part: &[u8], at: usize, to: usize) -> Result<(), Self::Error>;
    /// A ticket behind all copies that were enqueued so far.
    fn mark(&self) -> Result<Self::Ticket, Self::Error>;
    /// Waits for a ticket.
    fn wait(&self, ticket: Self::Ticket) -> Result<(), Self::Error>;
    /// Gives up a ticket without waiting for it.
    fn forget(&self, ticket: Self::Ticket);
    /// Waits for all copies that were enqueued so far, with or without a ticket.
    fn wait_for_all(&self) -> Result<(), Self::Error>;
}

/// Hands out stretches of a ring, and takes them back in the order in which they were handed out.
pub(super) struct Ring<Ticket> {
    len: usize,
    /// Where the next stretch begins, and how much before it is taken, with what was passed over.
    head: usize,
    taken: usize,
    /// Taken for each copy on its way, and what tells that it arrived.
    underway: VecDeque<(usize, Ticket)>,
    /// Of the stretch that was handed out last.
    last: usize,
}

impl<Ticket> Ring<Ticket> {
    pub fn new(len: usize) -> Ring<Ticket> {
        Ring { len, head: 0, taken: 0, underway: VecDeque::new(), last: 0 }
    }

    /// Copies bytes through the ring, in parts, so that one is filled while others are on their way.
    /// `bytes` are read before this returns.
    ///
    /// # Errors
    /// Those of `copies`. A copy without a ticket may be on its way then, so everything is waited
    /// for before a stretch of the ring is handed out again.
    pub fn send<C: Copies<Ticket = Ticket>>(
        &mut self,
        bytes: &[u8],
        copies: &C,
    ) -> Result<(), C::Error> {
        let part_len = (self.len / 4).max(1);
        for (index, part) in bytes.chunks(part_len).enumerate() {
            let sent = self
                .take(part.len(), |ticket| copies.wait(ticket))
                .and_then(|at| copies.copy(part, at, index * part_len))
                .and_then(|()| copies.mark());
            match sent {
                Ok(ticket) => self.hold(ticket),
                Err(error) => {
                    // Where the device cannot wait either, it failed for good: that is what the
                    // first error says.
                    let _ = copies.wait_for_all();
                    self.drain().for_each(|ticket| copies.forget(ticket));
                    return Err(error);
                }
            }
        }
        Ok(())
    }

    /// Where there is room for so many bytes in a row, at most as many as the ring has. `wait` waits
    /// for the oldest copies as long as there is none. [`hold`](Ring::hold) must follow.
    ///
    /// # Errors
    /// Those of `wait`.
    fn take<Error>(
        &mut self,
        bytes: usize,
        mut wait: impl FnMut(Ticket) -> Result<(), Error>,
    ) -> Result<usize, Error> {
        assert!(bytes <= self.len, "a stretch fits the ring");
        loop {
            // What is left at the end is passed over where it is too short.
            let wraps = self.head + bytes > self.len;
            let skipped = if wraps { self.len - self.head } else { 0 };
            if self.taken + skipped + bytes <= self.len {
                let start = if wraps { 0 } else { self.head };
                self.head = start + bytes;
                self.last = skipped + bytes;
                self.taken += self.last;
                return Ok(start);
            }
            match self.underway.pop_front() {
                Some((taken, ticket)) => {
                    wait(ticket)?;
                    self.taken -= taken;
                }
                // Nothing is on its way: the ring begins anew.
                None => (self.head, self.taken) = (0, 0),
            }
        }
    }

    /// The stretch taken last is free when this has arrived.
    fn hold(&mut self, ticket: Ticket) {
        self.underway.push_back((self.last, ticket));
    }

    /// Everything that is on its way.
    pub fn drain(&mut self) -> impl Iterator<Item = Ticket> {
        self.taken = 0;
        self.head = 0;
        self.underway.drain(..).map(|(_, ticket)| ticket)
    }
}

#[cfg(test)]
mod tests {
    use std::cell::{Cell, RefCell};

    use super::*;

    #[test]
    fn no_two_copies_underway_share_a_byte() {
        for seed in 0..200 {
            let mut rng = fastrand::Rng::with_seed(seed);
            let len = rng.usize(1..200);
            let mut ring = Ring::new(len);
            let (mut owners, mut places): (Vec<Option<usize>>, Vec<(usize, usize)>) =
                (vec![None; len], Vec::new());
            let mut next_arrival = 0;
            for ticket in 0..200 {
                let bytes = rng.usize(0..=len);
                let start = ring.take(bytes, |arrived: usize| {
                    assert_eq!(arrived, next_arrival, "in order");
                    next_arrival += 1;
                    let (start, bytes) = places[arrived];
                    owners[start..start + bytes].fill(None);
                    Ok::<(), ()>(())
                });
                let start = start.expect("nothing fails");
                assert!(owners[start..start + bytes].iter().all(Option::is_none), "seed {seed}");
                owners[start..start + bytes].fill(Some(ticket));
                places.push((start, bytes));
                ring.hold(ticket);
            }
        }
    }

    #[test]
    fn a_ring_with_room_waits_for_nothing() {
        let mut ring = Ring::new(100);
        for ticket in 0..4 {
            ring.take::<()>(25, |_| panic!("there is room")).expect("nothing fails");
            ring.hold(ticket);
        }
        let mut arrived = Vec::new();
        let start = ring.take(30, |ticket| {
            arrived.push(ticket);
            Ok::<(), ()>(())
        });
        assert_eq!((start.expect("nothing fails"), arrived), (0, vec![0, 1]));
        ring.hold(4);
        assert_eq!(ring.drain().collect::<Vec<i32>>(), [2, 3, 4]);
        assert_eq!(ring.take::<()>(100, |_| panic!("all is free")).expect("nothing fails"), 0);
    }

    /// A device that reads a ring late, and fails at one of its calls.
    struct LateCopies {
        ring: RefCell<Vec<u8>>,
        /// Copies on their way: where in the ring, where to, and the bytes that must arrive.
        underway: RefCell<VecDeque<(usize, usize, Vec<u8>)>>,
        memory: RefCell<Vec<u8>>,
        num_enqueued: Cell<usize>,
        num_tickets: Cell<usize>,
        calls_until_failure: Cell<usize>,
    }

    impl LateCopies {
        fn new(ring_len: usize, memory_len: usize, calls_until_failure: usize) -> LateCopies {
            LateCopies {
                ring: RefCell::new(vec![0; ring_len]),
                underway: RefCell::default(),
                memory: RefCell::new(vec![0; memory_len]),
                num_enqueued: Cell::new(0),
                num_tickets: Cell::new(0),
                calls_until_failure: Cell::new(calls_until_failure),
            }
        }

        fn fails(&self) -> bool {
            let calls = self.calls_until_failure.get();
            self.calls_until_failure.set(calls.wrapping_sub(1));
            calls == 0
        }

        fn arrive(&self, left: usize) {
            while self.underway.borrow().len() > left {
                let (at, to, expected) = self.underway.borrow_mut().pop_front().expect("counted");
                let ring = self.ring.borrow();
                let found = &ring[at..at + expected.len()];
                assert_eq!(found, expected, "bytes changed before they were copied");
                self.memory.borrow_mut()[to..to + found.len()].copy_from_slice(found);
            }
        }
    }

    impl Copies for LateCopies {
        type Ticket = usize;
        type Error = ();

        fn copy(&self, part: &[u8], at: usize, to: usize) -> Result<(), ()> {
            if self.fails() {
                return Err(());
            }
            self.ring.borrow_mut()[at..at + part.len()].copy_from_slice(part);
            self.underway.borrow_mut().push_back((at, to, part.to_vec()));
            self.num_enqueued.set(self.num_enqueued.get() + 1);
            Ok(())
        }

        fn mark(&self) -> Result<usize, ()> {
            if self.fails() {
                return Err(());
            }
            self.num_tickets.set(self.num_tickets.get() + 1);
            Ok(self.num_enqueued.get())
        }

        fn wait(&self, ticket: usize) -> Result<(), ()> {
            self.num_tickets.set(self.num_tickets.get() - 1);
            if self.fails() {
                return Err(());
            }
            let behind = self.num_enqueued.get() - ticket;
            self.arrive(behind);
            Ok(())
        }

        fn forget(&self, _ticket: usize) {
            self.num_tickets.set(self.num_tickets.get() - 1);
        }

        fn wait_for_all(&self) -> Result<(), ()> {
            self.arrive(0);
            Ok(())
        }
    }

    #[test]
    fn a_copy_that_fails_at_any_call_leaves_the_ring_free_and_no_bytes_in_danger() {
        let bytes: Vec<u8> = (0..100).collect();
        let mut num_failures = 0;
        for calls_until_failure in 0..60 {
            let copies = LateCopies::new(16, bytes.len(), calls_until_failure);
            let mut ring = Ring::new(16);
            let failed = ring.send(&bytes[..60], &copies).is_err();
            if failed {
                num_failures += 1;
                assert_eq!(copies.num_tickets.get(), 0, "no ticket is left");
                assert_eq!(copies.underway.borrow().len(), 0, "nothing is on its way");
            }
            // Later copies go through the ring as ever.
            let is_over = copies.calls_until_failure.get() > 60;
            if is_over {
                ring.send(&bytes, &copies).expect("it fails once");
                copies.wait_for_all().expect("it fails once");
                assert_eq!(*copies.memory.borrow(), bytes, "{calls_until_failure}");
            }
        }
        // Fifteen parts, each copied and marked, and all but four waited for.
        assert_eq!(num_failures, 15 + 15 + 11);
    }
}
