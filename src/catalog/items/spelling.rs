//! Which number in the text of a code is the code.
//!
//! It is the last one as a rule: `<a_3>`, `<l2_250>`. Some write the level behind it, as
//! `<sid_7_level2>`. Then the last number is the same for all items of a file, level by level, and
//! another one is not.

use super::jsonl::Code;

/// Finds out which number it is, item by item.
#[derive(Default)]
pub(super) struct Spelling {
    /// By level: the numbers of the first item's text, the last one first.
    first: Vec<Vec<u64>>,
    /// By place from the end: whether a number there differs between items at some level.
    varies: Vec<bool>,
}

impl Spelling {
    /// Looks at the next item. Whether further items can change the result.
    pub fn look(&mut self, codes: &[Code]) -> bool {
        let numbers: Vec<Vec<u64>> = codes.iter().map(Code::numbers).collect();
        let Some(fewest) = numbers.iter().map(Vec::len).min().filter(|&fewest| fewest > 1) else {
            *self = Spelling::default();
            return false;
        };
        if self.first.is_empty() {
            (self.first, self.varies) = (numbers, vec![false; fewest]);
            return true;
        }
        self.varies.truncate(fewest);
        for (place, varies) in self.varies.iter_mut().enumerate() {
            let mut levels = self.first.iter().zip(&numbers);
            *varies |= levels.any(|(first, own)| first.get(place) != own.get(place));
        }
        !self.varies[0]
    }

    /// The place of the code among the numbers of its text, from the end.
    pub fn place(&self) -> usize {
        match self.varies.first() {
            Some(false) => self.varies.iter().position(|&varies| varies).unwrap_or(0),
            _ => 0,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn place(items: &[&[&str]]) -> usize {
        let mut spelling = Spelling::default();
        for item in items {
            let codes: Vec<Code> = item.iter().map(|text| Code::Text(text.to_string())).collect();
            if !spelling.look(&codes) {
                break;
            }
        }
        spelling.place()
    }

    #[test]
    fn a_code_is_the_last_number_unless_that_one_counts_the_levels() {
        assert_eq!(place(&[&["<a_1>", "<b_2>"], &["<a_2>", "<b_2>"]]), 0);
        assert_eq!(place(&[&["<l0_1>", "<l1_2>"], &["<l0_1>", "<l1_3>"]]), 0);
        assert_eq!(place(&[&["<l0_0>", "<l1_1>"]]), 0);
        assert_eq!(place(&[&["<s_0_l0>", "<s_1_l1>"], &["<s_0_l0>", "<s_2_l1>"]]), 1);
        let numbers = [Code::Number(3), Code::Number(4)];
        assert!(!Spelling::default().look(&numbers));
    }
}
