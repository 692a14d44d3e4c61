//! Places in a ring of memory for copies that are on their way.

use std::collections::VecDeque;

use crate::error::Result;

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

    /// Where there is room for so many bytes in a row, at most as many as the ring has. `wait` waits
    /// for the oldest copies as long as there is none. [`hold`](Ring::hold) must follow.
    ///
    /// # Errors
    /// Those of `wait`.
    pub fn take(
        &mut self,
        bytes: usize,
        mut wait: impl FnMut(Ticket) -> Result<()>,
    ) -> Result<usize> {
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
    pub fn hold(&mut self, ticket: Ticket) {
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
                    Ok(())
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
            ring.take(25, |_| panic!("there is room")).expect("nothing fails");
            ring.hold(ticket);
        }
        let mut arrived = Vec::new();
        let start = ring.take(30, |ticket| {
            arrived.push(ticket);
            Ok(())
        });
        assert_eq!((start.expect("nothing fails"), arrived), (0, vec![0, 1]));
        ring.hold(4);
        assert_eq!(ring.drain().collect::<Vec<i32>>(), [2, 3, 4]);
        assert_eq!(ring.take(100, |_| panic!("all is free")).expect("nothing fails"), 0);
    }
}
