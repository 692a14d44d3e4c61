//! Files of embeddings: one matrix, a row an item, as safetensors or as NumPy's `.npy`.

use std::collections::HashSet;
use std::path::Path;

use sidereal::models::weights::Weights;
use sidereal::{Error, Result};

use super::arguments::say;

/// The one matrix of a file, with its number of columns. Rows of zeros and rows that occur again
/// are said: they are often a fault of the program that wrote the file.
pub fn matrix(path: &Path) -> Result<(Vec<f32>, usize)> {
    let (matrix, columns) = match path.extension().is_some_and(|extension| extension == "npy") {
        true => {
            let bytes = std::fs::read(path).map_err(|error| Error::io(path, error))?;
            npy(&bytes).map_err(|reason| Error::ModelConfig { path: path.to_path_buf(), reason })?
        }
        false => safetensors(path)?,
    };
    warn(path, &matrix, columns);
    Ok((matrix, columns))
}

fn safetensors(path: &Path) -> Result<(Vec<f32>, usize)> {
    let mut weights = Weights::open_file(path)?;
    let shapes = weights.shapes();
    let [(name, shape)] = &shapes[..] else {
        let reason = format!("holds {} tensors, one is expected: the embeddings", shapes.len());
        return Err(Error::ModelConfig { path: path.to_path_buf(), reason });
    };
    let [_, columns] = shape[..] else {
        let reason = format!("{name:?} is {shape:?}, not [items, numbers]");
        return Err(Error::ModelConfig { path: path.to_path_buf(), reason });
    };
    Ok((weights.take(name, shape)?.to_vec(), columns))
}

fn warn(path: &Path, matrix: &[f32], columns: usize) {
    let rows = || matrix.chunks_exact(columns.max(1));
    let zeros: Vec<usize> = rows()
        .enumerate()
        .filter(|(_, row)| row.iter().all(|&number| number == 0.0))
        .map(|(row, _)| row)
        .collect();
    if let Some(first) = zeros.first() {
        let count = zeros.len();
        say(&format!("{}: {count} rows are all zeros, the first is {first}", path.display()));
    }
    let mut seen = HashSet::new();
    let is_again = |row: &&[f32]| {
        let bits: Vec<u32> = row.iter().map(|number| number.to_bits()).collect();
        !seen.insert(bits)
    };
    let again = rows().filter(is_again).count().saturating_sub(zeros.len().saturating_sub(1));
    if again > 0 {
        let path = path.display();
        say(&format!("{path}: {again} rows are equal to an earlier one and get its codes"));
    }
}

/// A matrix of NumPy's format, version 1 to 3: <https://numpy.org/doc/stable/reference/generated/numpy.lib.format.html>.
fn npy(bytes: &[u8]) -> std::result::Result<(Vec<f32>, usize), String> {
    let cut = || "the file ends in its header".to_string();
    let version = bytes.strip_prefix(b"\x93NUMPY").ok_or("this is no .npy file")?;
    let (start, len) = match version {
        [1, _, low, high, ..] => (10, usize::from(u16::from_le_bytes([*low, *high]))),
        [2 | 3, _, a, b, c, d, ..] => (12, u32::from_le_bytes([*a, *b, *c, *d]) as usize),
        _ => return Err(cut()),
    };
    let header = bytes.get(start..start + len).ok_or_else(cut)?;
    let header = std::str::from_utf8(header).map_err(|_| "the header is not a text".to_string())?;
    // A Python dictionary: {'descr': '<f4', 'fortran_order': False, 'shape': (3, 2), }
    let value =
        |key: &str| header.split_once(&format!("'{key}':")).map(|(_, rest)| rest.trim_start());
    let descr = value("descr").and_then(|rest| rest.split('\'').nth(1)).unwrap_or_default();
    let shape = value("shape").and_then(|rest| rest.split(['(', ')']).nth(1)).unwrap_or_default();
    let sizes = shape.split(',').map(str::trim).filter(|size| !size.is_empty());
    let sizes: Vec<usize> = sizes.filter_map(|size| size.parse().ok()).collect();
    let [rows, columns] = sizes[..] else {
        return Err(format!("the array is ({shape}), not (items, numbers)"));
    };
    if columns == 0 || rows == 0 {
        return Err("the array is empty".into());
    }
    if value("fortran_order").is_some_and(|rest| rest.starts_with("True")) {
        return Err("the array is in Fortran's order; save numpy.ascontiguousarray(array)".into());
    }
    let data = &bytes[start + len..];
    let width = match descr {
        "<f2" => 2,
        "<f4" => 4,
        "<f8" => 8,
        other => {
            return Err(format!("the numbers are {other:?}; save array.astype('<f4'), <f2 or <f8"));
        }
    };
    let expected = rows.checked_mul(columns).and_then(|count| count.checked_mul(width));
    if expected != Some(data.len()) {
        let len = data.len();
        return Err(format!(
            "{len} bytes of numbers are there, not ({shape}) of {width} bytes each"
        ));
    }
    let numbers = data.chunks_exact(width).map(|bytes| match *bytes {
        [a, b] => half(u16::from_le_bytes([a, b])),
        [a, b, c, d] => f32::from_le_bytes([a, b, c, d]),
        _ => f64::from_le_bytes(bytes.try_into().expect("eight bytes")) as f32,
    });
    Ok((numbers.collect(), columns))
}

/// A number of IEEE 754's half precision.
fn half(bits: u16) -> f32 {
    let sign = if bits >> 15 == 1 { -1.0 } else { 1.0 };
    let (exponent, fraction) = (i32::from(bits >> 10 & 31), f32::from(bits & 1023));
    sign * match exponent {
        0 => fraction * 2f32.powi(-24),
        31 if fraction == 0.0 => f32::INFINITY,
        31 => f32::NAN,
        _ => (1024.0 + fraction) * 2f32.powi(exponent - 25),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(header: &str, data: &[u8]) -> Vec<u8> {
        let mut bytes = b"\x93NUMPY\x01\x00".to_vec();
        bytes.extend((header.len() as u16).to_le_bytes());
        bytes.extend(header.as_bytes());
        bytes.extend(data);
        bytes
    }

    #[test]
    fn a_matrix_is_read_in_each_precision() {
        let header = |descr: &str| {
            format!("{{'descr': '{descr}', 'fortran_order': False, 'shape': (1, 3), }}\n")
        };
        let singles: Vec<u8> = [1.5f32, -2.0, 0.25].iter().flat_map(|n| n.to_le_bytes()).collect();
        let doubles: Vec<u8> = [1.5f64, -2.0, 0.25].iter().flat_map(|n| n.to_le_bytes()).collect();
        let halves: Vec<u8> =
            [0x3e00u16, 0xc000, 0x3400].iter().flat_map(|n| n.to_le_bytes()).collect();
        for (descr, data) in [("<f4", &singles), ("<f8", &doubles), ("<f2", &halves)] {
            let found = npy(&file(&header(descr), data));
            assert_eq!(found, Ok((vec![1.5, -2.0, 0.25], 3)), "{descr}");
        }
        assert_eq!(half(1), 2f32.powi(-24));
    }

    #[test]
    fn another_array_is_refused_with_the_reason() {
        let data = [0; 8];
        for (header, word) in [
            ("{'descr': '<i8', 'fortran_order': False, 'shape': (1, 1), }", "astype"),
            ("{'descr': '<f4', 'fortran_order': True, 'shape': (1, 2), }", "ascontiguousarray"),
            ("{'descr': '<f4', 'fortran_order': False, 'shape': (2,), }", "(items, numbers)"),
            ("{'descr': '<f4', 'fortran_order': False, 'shape': (3, 2), }", "8 bytes"),
            ("{'descr': '<f4', 'fortran_order': False, 'shape': (0, 2), }", "empty"),
        ] {
            let reason = npy(&file(header, &data)).expect_err("refused");
            assert!(reason.contains(word), "{reason}");
        }
        assert!(npy(b"\x93NUMPY\x01\x00\xff\xff{").is_err());
        assert!(npy(b"PK").is_err());
    }
}
