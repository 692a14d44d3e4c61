//! Numbers in as few bits as the largest of them needs.

/// Numbers below a limit, each in as many bits.
#[derive(Debug)]
pub(super) struct Packed {
    words: Vec<u64>,
    bits: u32,
    len: usize,
}

impl Packed {
    /// `len` zeros with room for numbers up to `largest`.
    pub fn new(len: usize, largest: u64) -> Packed {
        let bits = (u64::BITS - largest.leading_zeros()).max(1);
        // One word more: a number is read from two words.
        let words = vec![0; (len * bits as usize).div_ceil(64) + 1];
        Packed { words, bits, len }
    }

    pub fn len(&self) -> usize {
        self.len
    }

    #[inline]
    pub fn get(&self, index: usize) -> u64 {
        assert!(index < self.len, "number {index} of {}", self.len);
        let (word, shift) = self.place(index);
        let both = u128::from(self.words[word]) | u128::from(self.words[word + 1]) << 64;
        (both >> shift) as u64 & self.mask()
    }

    /// Writes a number over whatever is there.
    pub fn set(&mut self, index: usize, number: u64) {
        assert!(number <= self.mask(), "{number} has more than {} bits", self.bits);
        let (word, shift) = self.place(index);
        let both = u128::from(self.words[word]) | u128::from(self.words[word + 1]) << 64;
        let both = both & !(u128::from(self.mask()) << shift) | u128::from(number) << shift;
        (self.words[word], self.words[word + 1]) = (both as u64, (both >> 64) as u64);
    }

    pub fn size_bytes(&self) -> usize {
        size_of_val(&*self.words)
    }

    fn place(&self, index: usize) -> (usize, u32) {
        let bit = index * self.bits as usize;
        (bit / 64, (bit % 64) as u32)
    }

    fn mask(&self) -> u64 {
        u64::MAX >> (64 - self.bits)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_of_every_width_come_back() {
        for bits in [1u32, 7, 20, 33, 63, 64] {
            let largest = u64::MAX >> (64 - bits);
            let mut rng = fastrand::Rng::with_seed(u64::from(bits));
            let numbers: Vec<u64> = (0..200).map(|_| rng.u64(..) & largest).collect();
            let mut packed = Packed::new(numbers.len(), largest);
            (0..200).for_each(|at| packed.set(at, largest));
            numbers.iter().enumerate().for_each(|(at, &number)| packed.set(at, number));
            let found: Vec<u64> = (0..200).map(|at| packed.get(at)).collect();
            assert_eq!(found, numbers, "{bits} bits");
        }
    }
}
