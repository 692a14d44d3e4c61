//! Tensors of the protocol: a number type, a shape, values; as JSON and as bytes.

use bytes::{BufMut, Bytes, BytesMut};
use serde_json::Value;

use super::super::error::{Failure, Outcome};

/// Elements that a tensor of a request may have.
const MAX_ELEMENTS: usize = 1 << 24;

/// Number types, by the protocol's names.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Datatype {
    Bool,
    Uint8,
    Uint16,
    Uint32,
    Uint64,
    Int8,
    Int16,
    Int32,
    Int64,
    Fp32,
    Fp64,
    Bytes,
}

const DATATYPES: [(Datatype, &str); 12] = [
    (Datatype::Bool, "BOOL"),
    (Datatype::Uint8, "UINT8"),
    (Datatype::Uint16, "UINT16"),
    (Datatype::Uint32, "UINT32"),
    (Datatype::Uint64, "UINT64"),
    (Datatype::Int8, "INT8"),
    (Datatype::Int16, "INT16"),
    (Datatype::Int32, "INT32"),
    (Datatype::Int64, "INT64"),
    (Datatype::Fp32, "FP32"),
    (Datatype::Fp64, "FP64"),
    (Datatype::Bytes, "BYTES"),
];

impl Datatype {
    pub fn parse(name: &str) -> Outcome<Datatype> {
        let found = DATATYPES.iter().find(|(_, other)| *other == name);
        found.map(|(datatype, _)| *datatype).ok_or_else(|| {
            let known: Vec<&str> = DATATYPES.iter().map(|(_, name)| *name).collect();
            let name = super::super::error::quoted(name);
            Failure::malformed(format!("datatype {name} is none of {}", known.join(", ")))
        })
    }

    pub fn name(self) -> &'static str {
        let found = DATATYPES.iter().find(|(datatype, _)| *datatype == self);
        found.expect("all of them are there").1
    }

    /// The name in the configuration of a model.
    pub fn config_name(self) -> String {
        match self {
            Datatype::Bytes => "TYPE_STRING".into(),
            other => format!("TYPE_{}", other.name()),
        }
    }

    /// Bytes of an element; `None` where they differ.
    fn size(self) -> Option<usize> {
        match self {
            Datatype::Bool | Datatype::Uint8 | Datatype::Int8 => Some(1),
            Datatype::Uint16 | Datatype::Int16 => Some(2),
            Datatype::Uint32 | Datatype::Int32 | Datatype::Fp32 => Some(4),
            Datatype::Uint64 | Datatype::Int64 | Datatype::Fp64 => Some(8),
            Datatype::Bytes => None,
        }
    }
}

/// A tensor of a request, its values as JSON has them: texts, numbers, true and false.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Input {
    pub name: String,
    pub datatype: Datatype,
    pub shape: Vec<usize>,
    pub values: Vec<Value>,
}

/// The number of elements of a shape.
pub(super) fn num_elements(name: &str, shape: &[i64]) -> Outcome<(Vec<usize>, usize)> {
    let sizes: Option<Vec<usize>> = shape.iter().map(|&size| usize::try_from(size).ok()).collect();
    let product = sizes.as_ref().and_then(|sizes| {
        sizes.iter().try_fold(1usize, |product, &size| product.checked_mul(size))
    });
    match (sizes, product) {
        (Some(sizes), Some(product)) if product <= MAX_ELEMENTS && sizes.len() <= 8 => {
            Ok((sizes, product))
        }
        _ => Err(Failure::malformed(format!(
            "input {name:?} has shape {shape:?}; sizes are not negative, and a tensor has \
             {MAX_ELEMENTS} elements at most"
        ))),
    }
}

impl Input {
    /// A tensor whose values are known, one for each element of the shape.
    pub fn new(name: &str, datatype: &str, shape: &[i64], values: Vec<Value>) -> Outcome<Input> {
        let (sizes, product) = num_elements(name, shape)?;
        if values.len() != product {
            return Err(Failure::malformed(format!(
                "input {name:?} has {} values, its shape {shape:?} has {product} elements",
                values.len()
            )));
        }
        let datatype = Datatype::parse(datatype)?;
        Ok(Input { name: name.into(), datatype, shape: sizes, values })
    }

    /// A tensor of raw bytes: little-endian numbers, or texts after their lengths.
    pub fn from_raw(name: &str, datatype: &str, shape: &[i64], raw: &[u8]) -> Outcome<Input> {
        let kind = Datatype::parse(datatype)?;
        let (_, product) = num_elements(name, shape)?;
        let values = match kind.size() {
            Some(size) if raw.len() == product * size => {
                raw.chunks_exact(size).map(|bytes| number(kind, bytes)).collect::<Option<_>>()
            }
            Some(_) => None,
            None => texts(raw, product),
        };
        let values = values.ok_or_else(|| {
            Failure::malformed(format!(
                "input {name:?}: {} bytes are not {product} elements of {datatype}",
                raw.len()
            ))
        })?;
        Input::new(name, datatype, shape, values)
    }

    /// A tensor whose data are JSON, in nested lists or in one.
    pub fn from_json(name: &str, datatype: &str, shape: &[i64], data: Value) -> Outcome<Input> {
        let mut values = Vec::new();
        flatten(data, &mut values);
        Input::new(name, datatype, shape, values)
    }
}

/// Lists in lists are as deep as the parser of JSON allows.
fn flatten(data: Value, values: &mut Vec<Value>) {
    match data {
        Value::Array(list) => list.into_iter().for_each(|value| flatten(value, values)),
        value => values.push(value),
    }
}

/// One number; `None` where JSON has none for it, as for NaN.
fn number(datatype: Datatype, bytes: &[u8]) -> Option<Value> {
    macro_rules! read {
        ($type:ty) => {
            <$type>::from_le_bytes(bytes.try_into().expect("cut to the size")).into()
        };
    }
    let value: Value = match datatype {
        Datatype::Bool => (bytes[0] != 0).into(),
        Datatype::Uint8 => read!(u8),
        Datatype::Uint16 => read!(u16),
        Datatype::Uint32 => read!(u32),
        Datatype::Uint64 => read!(u64),
        Datatype::Int8 => read!(i8),
        Datatype::Int16 => read!(i16),
        Datatype::Int32 => read!(i32),
        Datatype::Int64 => read!(i64),
        Datatype::Fp32 => read!(f32),
        Datatype::Fp64 => read!(f64),
        Datatype::Bytes => return None,
    };
    (!value.is_null()).then_some(value)
}

/// So many texts, each after its length in four bytes, and nothing beside them.
fn texts(mut raw: &[u8], product: usize) -> Option<Vec<Value>> {
    // Each has four bytes at least: a shape that lies does not take memory.
    let mut values = Vec::with_capacity(product.min(raw.len() / 4));
    for _ in 0..product {
        let (length, rest) = raw.split_first_chunk::<4>()?;
        let (text, rest) = rest.split_at_checked(u32::from_le_bytes(*length) as usize)?;
        values.push(std::str::from_utf8(text).ok()?.into());
        raw = rest;
    }
    raw.is_empty().then_some(values)
}

/// A tensor of an answer.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Output {
    pub name: &'static str,
    pub shape: Vec<usize>,
    pub values: Values,
}

/// The values of an output.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Values {
    Text(Vec<String>),
    Int32(Vec<i32>),
    Uint64(Vec<u64>),
    Fp32(Vec<f32>),
}

impl Output {
    pub fn datatype(&self) -> Datatype {
        match self.values {
            Values::Text(_) => Datatype::Bytes,
            Values::Int32(_) => Datatype::Int32,
            Values::Uint64(_) => Datatype::Uint64,
            Values::Fp32(_) => Datatype::Fp32,
        }
    }

    pub fn json(&self) -> Value {
        match &self.values {
            Values::Text(texts) => texts.clone().into(),
            Values::Int32(numbers) => numbers.clone().into(),
            Values::Uint64(numbers) => numbers.clone().into(),
            Values::Fp32(numbers) => numbers.clone().into(),
        }
    }

    pub fn raw(&self) -> Bytes {
        let mut raw = BytesMut::new();
        match &self.values {
            Values::Text(texts) => texts.iter().for_each(|text| {
                raw.put_u32_le(text.len() as u32);
                raw.put_slice(text.as_bytes());
            }),
            Values::Int32(numbers) => numbers.iter().for_each(|&number| raw.put_i32_le(number)),
            Values::Uint64(numbers) => numbers.iter().for_each(|&number| raw.put_u64_le(number)),
            Values::Fp32(numbers) => numbers.iter().for_each(|&number| raw.put_f32_le(number)),
        }
        raw.freeze()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn raw_bytes_are_read_as_the_type_says() {
        let raw = |datatype: &str, shape: &[i64], bytes: &[u8]| {
            Input::from_raw("x", datatype, shape, bytes).map(|input| input.values)
        };
        let numbers: Vec<u8> = [-1i64, 7].into_iter().flat_map(i64::to_le_bytes).collect();
        assert_eq!(raw("INT64", &[2], &numbers).expect("two"), [-1, 7].map(Value::from));
        let texts = b"\x02\0\0\0hi\0\0\0\0";
        assert_eq!(raw("BYTES", &[1, 2], texts).expect("two"), ["hi", ""].map(Value::from));
        assert_eq!(raw("FP32", &[1], &1.5f32.to_le_bytes()).expect("one"), [Value::from(1.5)]);
        assert_eq!(raw("BYTES", &[0], b"").expect("none"), [] as [Value; 0]);
    }

    #[test]
    fn what_is_no_tensor_is_refused_and_takes_no_memory() {
        let nan = f32::NAN.to_le_bytes();
        for (datatype, shape, bytes) in [
            ("INT64", &[2i64][..], &b"12345678"[..]),
            ("INT64", &[-1], b"12345678"),
            ("INT64", &[i64::MAX, i64::MAX], b""),
            ("BYTES", &[1 << 24], b""),
            ("BYTES", &[1], b"\xff\xff\xff\xffhi"),
            ("BYTES", &[1], b"\x02\0\0\0hi!"),
            ("BYTES", &[1], b"\x01\0\0\0\xff"),
            ("BYTES", &[1], b"\x01"),
            ("FP32", &[1], &nan),
            ("FP8", &[1], b"1"),
            ("INT8", &[1, 1, 1, 1, 1, 1, 1, 1, 1], b"1"),
        ] {
            let input = Input::from_raw("x", datatype, shape, bytes);
            let failure = input.expect_err("no tensor");
            assert_eq!(failure.status.as_u16(), 400, "{datatype} {shape:?}");
        }
    }
}
