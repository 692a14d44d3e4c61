//! How files of items spell codes: as numbers, or as texts that hold them.
//!
//! A text's code is usually its last number, `<a_236>`. Where a text has several numbers, the code
//! is the one that differs between the items of a level: the last of `<l2_7>`, the first of
//! `<sid_7_level2>`. A file is read once more for that, and only where its first item has such texts.

use serde::Deserialize;

use crate::catalog::sid::Sid;
use crate::error::{Error, Result};

#[derive(Deserialize)]
#[serde(untagged, expecting = "expected a code, a whole number or a text such as \"<a_3>\"")]
pub(crate) enum Code {
    Number(u64),
    Text(String),
}

impl Code {
    /// The code; of a text, its number at `place`, counted from the last.
    fn value(&self, place: usize) -> Result<u16> {
        let number = match self {
            Code::Number(number) => Some(*number),
            Code::Text(text) => numbers(text).rev().nth(place).flatten(),
        };
        number.and_then(|number| u16::try_from(number).ok()).ok_or_else(|| Error::InvalidField {
            field: "sid",
            reason: match self {
                Code::Number(number) => format!("code {number} is over 65535"),
                Code::Text(text) => format!("code {text:?} holds no number up to 65535"),
            },
        })
    }

    /// The text, if it is one.
    pub fn text(&self) -> Option<&str> {
        match self {
            Code::Number(_) => None,
            Code::Text(text) => Some(text),
        }
    }

    /// Whether the text alone does not say which of its numbers is the code.
    pub fn is_unclear(&self) -> bool {
        matches!(self, Code::Text(text) if numbers(text).nth(1).is_some())
    }
}

/// The semantic ID of codes that need no other item to be understood.
///
/// # Errors
/// [`Error::InvalidField`] for a text of several numbers, of which any may be the code.
pub(crate) fn to_sid(codes: &[Code]) -> Result<Sid> {
    if let Some(text) = codes.iter().find(|code| code.is_unclear()).and_then(Code::text) {
        return Err(Error::InvalidField {
            field: "sid",
            reason: format!(
                "code {text:?} holds several numbers, and without the other items of its file none of \
                 them is the code for certain: write it as a plain number"
            ),
        });
    }
    Spelling::default().to_sid(codes)
}

/// The numbers of a text; `None` for one that is too large.
fn numbers(text: &str) -> impl DoubleEndedIterator<Item = Option<u64>> {
    let digits = text.split(|c: char| !c.is_ascii_digit()).filter(|digits| !digits.is_empty());
    digits.map(|digits| digits.parse().ok())
}

/// Which number of its text a code is, by level, counted from the last. Levels beyond the list have
/// zero: the last.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Spelling(Vec<usize>);

impl Spelling {
    pub fn to_sid(&self, codes: &[Code]) -> Result<Sid> {
        let place = |level: usize| self.0.get(level).copied().unwrap_or(0);
        let codes = codes.iter().enumerate().map(|(level, code)| code.value(place(level)));
        Sid::new(&codes.collect::<Result<Vec<u16>>>()?)
    }
}

/// Finds the spelling of a file from all its codes.
#[derive(Default)]
pub(super) struct Learner(Vec<Level>);

struct Level {
    example: String,
    /// The numbers of the first text.
    first: Vec<Option<u64>>,
    /// By number: whether it differs between two items.
    differs: Vec<bool>,
    /// Some texts have more numbers than others.
    is_uneven: bool,
}

impl Learner {
    pub fn observe(&mut self, codes: &[Code]) {
        for (level, code) in codes.iter().enumerate() {
            let Code::Text(text) = code else { continue };
            if self.0.len() == level {
                let first: Vec<_> = numbers(text).collect();
                let differs = vec![false; first.len()];
                self.0.push(Level { example: text.clone(), first, differs, is_uneven: false });
            }
            let Some(level) = self.0.get_mut(level) else { continue };
            let mut count = 0;
            for (at, number) in numbers(text).enumerate() {
                count += 1;
                if let (Some(first), Some(differs)) =
                    (level.first.get(at), level.differs.get_mut(at))
                {
                    *differs |= number != *first;
                }
            }
            level.is_uneven |= count != level.first.len();
        }
    }

    /// The spelling, or why there is none.
    pub fn finish(self) -> std::result::Result<Spelling, String> {
        let mut places = Vec::new();
        for (number, level) in self.0.iter().enumerate() {
            let len = level.first.len();
            let mut differing = (0..len).rev().filter(|&at| level.differs[at]);
            let (first, second) = (differing.next(), differing.next());
            if let (false, Some(_)) = (level.is_uneven, second) {
                return Err(format!(
                    "several numbers of the texts of level {number} differ between items, as in {:?}: \
                     write each code as a plain number",
                    level.example
                ));
            }
            places.push(match level.is_uneven {
                true => Some(0),
                false => first.map(|at| len - 1 - at),
            });
        }
        // A level whose items all have one code is spelled as the others are.
        let usual = places.iter().flatten().next().copied().unwrap_or(0);
        let fits = |(place, level): (&Option<usize>, &Level)| {
            place.unwrap_or(usual.min(level.first.len().saturating_sub(1)))
        };
        Ok(Spelling(places.iter().zip(&self.0).map(fits).collect()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn last_number(text: &str) -> Option<u64> {
        numbers(text).next_back().flatten()
    }

    #[test]
    fn a_code_is_the_last_number_of_its_text() {
        assert_eq!(last_number("<a_236>"), Some(236));
        assert_eq!(last_number("<l2_7>é"), Some(7));
        assert_eq!(last_number("é9"), Some(9));
        assert_eq!(last_number("12"), Some(12));
        assert_eq!(last_number("<a_>"), None);
        assert_eq!(last_number("99999999999999999999999"), None);
    }

    #[test]
    fn a_text_of_several_numbers_is_no_code_by_itself() {
        let codes = |texts: [&str; 2]| texts.map(|text| Code::Text(text.into()));
        assert!(to_sid(&codes(["<a_3>", "4"])).is_ok_and(|sid| sid.codes() == [3, 4]));
        for texts in [["<a_3>", "<sid_7_level1>"], ["<l1_3>", "4"]] {
            let error = to_sid(&codes(texts)).expect_err("of which number?").to_string();
            assert!(error.contains("plain number"), "{error}");
        }
    }

    fn spelling(items: &[[&str; 2]]) -> std::result::Result<Spelling, String> {
        let mut learner = Learner::default();
        for item in items {
            learner.observe(&item.map(|text| Code::Text(text.into())));
        }
        learner.finish()
    }

    #[test]
    fn a_code_is_the_number_that_differs_between_items() {
        let found = spelling(&[["<sid_3_level0>", "<l1_4>"], ["<sid_5_level0>", "<l1_6>"]]);
        assert_eq!(found, Ok(Spelling(vec![1, 0])));
        // The second level has one code only.
        let found =
            spelling(&[["<sid_3_level0>", "<sid_4_level1>"], ["<sid_5_level0>", "<sid_4_level1>"]]);
        assert_eq!(found, Ok(Spelling(vec![1, 1])));
        let error =
            spelling(&[["<a_1_2>", "<b_3>"], ["<a_4_5>", "<b_6>"]]).expect_err("two differ");
        assert!(error.contains("<a_1_2>"), "{error}");
    }
}
