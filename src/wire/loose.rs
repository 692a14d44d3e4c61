//! Values of requests as programs write them.
//!
//! The same number is 10 in a file, 10.0 where it went through protobuf's `Struct` or through a column
//! with gaps, and "10" where proto3's JSON writes 64 bits. All mean ten, and all are read so; a text
//! that is no number, or a number with a fraction where a whole one belongs, is an error.

use std::fmt;

use serde::de::{self, Unexpected, Visitor};
use serde::{Deserialize, Deserializer};

/// Whole numbers of this size and more may not be what their writer meant once they are floats.
const FIRST_INEXACT: f64 = (1u64 << 53) as f64;

/// A whole number.
#[derive(Debug, Clone, Copy)]
pub(super) struct Whole(pub i128);

/// A number.
#[derive(Debug, Clone, Copy)]
pub(super) struct Real(pub f64);

/// The name of an item: a text or a whole number. A null in a list is the name of no item.
#[derive(Debug, Clone)]
pub(super) struct LooseName(pub String);

/// Any text, number, true or false, as text.
#[derive(Debug, Clone)]
pub(super) struct Scalar(pub String);

/// Implements `Deserialize` for a type by what it makes of each kind of JSON value.
macro_rules! read_as {
    ($type:ident, $expected:literal, { $($method:ident($value:ident: $of:ty) => $make:expr,)* }) => {
        impl<'de> Deserialize<'de> for $type {
            fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<$type, D::Error> {
                struct Read;
                impl Visitor<'_> for Read {
                    type Value = $type;

                    fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
                        formatter.write_str($expected)
                    }

                    $(fn $method<E: de::Error>(self, $value: $of) -> Result<$type, E> {
                        let made: Result<$type, Unexpected<'_>> = $make;
                        made.map_err(|unexpected| E::invalid_value(unexpected, &self))
                    })*

                    fn visit_unit<E: de::Error>(self) -> Result<$type, E> {
                        $type::of_null().ok_or_else(|| E::invalid_type(Unexpected::Unit, &self))
                    }
                }
                deserializer.deserialize_any(Read)
            }
        }
    };
}

read_as!(Whole, "a whole number", {
    visit_u64(value: u64) => Ok(Whole(value.into())),
    visit_i64(value: i64) => Ok(Whole(value.into())),
    visit_f64(value: f64) => match value.fract() == 0.0 && value.abs() < i64::MAX as f64 {
        true => Ok(Whole(value as i128)),
        false => Err(Unexpected::Float(value)),
    },
    visit_str(text: &str) => match text.parse() {
        Ok(number) => Ok(Whole(number)),
        Err(_) => Err(Unexpected::Str(text)),
    },
});

read_as!(Real, "a number", {
    visit_u64(value: u64) => Ok(Real(value as f64)),
    visit_i64(value: i64) => Ok(Real(value as f64)),
    visit_f64(value: f64) => Ok(Real(value)),
    visit_str(text: &str) => match text.parse() {
        Ok(number) if f64::is_finite(number) => Ok(Real(number)),
        _ => Err(Unexpected::Str(text)),
    },
});

read_as!(LooseName, "an item's name, a text or a whole number", {
    visit_u64(value: u64) => Ok(LooseName(value.to_string())),
    visit_i64(value: i64) => Ok(LooseName(value.to_string())),
    visit_f64(value: f64) => match value.fract() == 0.0 && value.abs() < FIRST_INEXACT {
        true => Ok(LooseName((value as i64).to_string())),
        false => Err(Unexpected::Float(value)),
    },
    visit_str(text: &str) => Ok(LooseName(text.to_string())),
});

read_as!(Scalar, "a text, a number, true or false", {
    visit_bool(value: bool) => Ok(Scalar(value.to_string())),
    visit_u64(value: u64) => Ok(Scalar(value.to_string())),
    visit_i64(value: i64) => Ok(Scalar(value.to_string())),
    visit_f64(value: f64) => Ok(Scalar(value.to_string())),
    visit_str(text: &str) => Ok(Scalar(text.to_string())),
});

impl Whole {
    fn of_null() -> Option<Whole> {
        None
    }
}

impl Real {
    fn of_null() -> Option<Real> {
        None
    }
}

impl LooseName {
    /// No item has an empty name.
    fn of_null() -> Option<LooseName> {
        Some(LooseName(String::new()))
    }
}

impl Scalar {
    fn of_null() -> Option<Scalar> {
        None
    }
}
