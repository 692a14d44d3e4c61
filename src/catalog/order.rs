//! In which order come the items that share a semantic ID?
//!
//! By weight, the largest first, then by name in the order of its bytes. Both belong to the items
//! themselves, so the order is that of a catalog built from the present items, whatever changes
//! led there and however often one of them was repeated.

use std::cmp::{Ordering, Reverse};

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};

/// The weight of an item among the items that share its semantic ID: larger comes first.
///
/// A finite number, 0 by default. Minus zero is zero.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize)]
#[serde(try_from = "f32", into = "f32")]
pub struct ItemWeight(f32);

impl ItemWeight {
    /// A weight.
    ///
    /// # Errors
    /// [`Error::InvalidField`] where `weight` is not finite.
    pub fn new(weight: f32) -> Result<ItemWeight> {
        match weight.is_finite() {
            true => Ok(ItemWeight(weight + 0.0)), // minus zero becomes zero
            false => {
                let reason = format!("{weight} is not a finite number of 32 bits");
                Err(Error::InvalidField { field: "weight", reason })
            }
        }
    }

    /// The number.
    pub fn get(self) -> f32 {
        self.0
    }

    /// Whether it is the weight of an item that has none of its own.
    pub fn is_default(&self) -> bool {
        *self == ItemWeight::default()
    }
}

impl Eq for ItemWeight {}

impl Ord for ItemWeight {
    fn cmp(&self, other: &ItemWeight) -> Ordering {
        self.0.total_cmp(&other.0)
    }
}

impl PartialOrd for ItemWeight {
    fn partial_cmp(&self, other: &ItemWeight) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl TryFrom<f32> for ItemWeight {
    type Error = Error;

    fn try_from(weight: f32) -> Result<ItemWeight> {
        ItemWeight::new(weight)
    }
}

impl From<ItemWeight> for f32 {
    fn from(weight: ItemWeight) -> f32 {
        weight.get()
    }
}

/// What decides between items of one semantic ID and one weight.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Ties {
    /// Their names.
    ByName,
    /// Who was added first: so files were compiled before items had weights. The first compaction
    /// puts the items in the order of their names.
    ByAge,
}

/// What orders the items of one semantic ID; the least comes first.
#[derive(PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct OrderKey<'a>(Reverse<ItemWeight>, Tie<'a>);

#[derive(PartialEq, Eq, PartialOrd, Ord)]
enum Tie<'a> {
    Name(&'a str),
    Number(u32),
}

impl<'a> OrderKey<'a> {
    /// `number`: ascending in the order of adding.
    pub fn new(ties: Ties, weight: ItemWeight, name: &'a str, number: u32) -> OrderKey<'a> {
        let tie = match ties {
            Ties::ByName => Tie::Name(name),
            Ties::ByAge => Tie::Number(number),
        };
        OrderKey(Reverse(weight), tie)
    }
}

/// Notes the weight of the next item, number `number`. `weights` stays empty until an item has a
/// weight of its own.
pub(super) fn push_weight(weights: &mut Vec<ItemWeight>, number: usize, weight: ItemWeight) {
    if !weight.is_default() {
        weights.resize(number, ItemWeight::default());
        weights.push(weight);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_weight_is_finite_and_minus_zero_is_zero() {
        for number in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            let error = ItemWeight::new(number).expect_err("not finite");
            assert!(error.to_string().contains("weight"), "{error}");
        }
        let zero = ItemWeight::new(-0.0).expect("finite");
        assert_eq!((zero, zero.get().to_bits()), (ItemWeight::default(), 0));
        let json = |text: &str| serde_json::from_str::<ItemWeight>(text);
        assert_eq!(json("3").expect("a number").get(), 3.0);
        for text in ["1e39", "\"3\"", "null", "1e999"] {
            assert!(json(text).is_err(), "{text}");
        }
    }

    #[test]
    fn a_larger_weight_comes_first_then_the_name_or_the_age_decides() {
        let weight = |weight| ItemWeight::new(weight).expect("finite");
        let items = [(0.0, "b"), (-1.0, "a"), (0.0, "B"), (f32::MIN_POSITIVE, "z"), (0.0, "bb")];
        let order = |ties| {
            let mut numbers: Vec<u32> = (0..items.len() as u32).collect();
            numbers.sort_by(|&a, &b| {
                let key = |number: u32| {
                    let (of, name) = items[number as usize];
                    OrderKey::new(ties, weight(of), name, number)
                };
                key(a).cmp(&key(b))
            });
            numbers
        };
        assert_eq!(order(Ties::ByName), [3, 2, 0, 4, 1]);
        assert_eq!(order(Ties::ByAge), [3, 0, 2, 4, 1]);
    }

    #[test]
    fn items_without_a_weight_of_their_own_cost_nothing() {
        let weight = |weight| ItemWeight::new(weight).expect("finite");
        let mut weights = Vec::new();
        push_weight(&mut weights, 0, weight(0.0));
        push_weight(&mut weights, 1, weight(0.0));
        assert_eq!(weights.capacity(), 0);
        push_weight(&mut weights, 2, weight(2.5));
        push_weight(&mut weights, 3, weight(0.0));
        push_weight(&mut weights, 4, weight(-1.0));
        assert_eq!(weights, [0.0, 0.0, 2.5, 0.0, -1.0].map(weight));
    }
}
