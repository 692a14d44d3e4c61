//! Files of the format `.npy`, which `numpy.save` writes.

use std::path::Path;
use std::sync::Arc;

use crate::error::{Error, Result};
use crate::mapping::Mapping;
use crate::tensor::{Dtype, Tensor};

const MAGIC: &[u8] = b"\x93NUMPY";

/// Maps a file with an array of little-endian f32 or f16 in C order.
///
/// # Errors
/// The operating system's; [`Error::WeightsFile`] where the file is damaged or holds another array.
pub(crate) fn open(path: &Path) -> Result<Tensor> {
    let mapping = Arc::new(Mapping::open(path, 0)?);
    let bad = |reason: String| Error::WeightsFile { path: path.to_path_buf(), reason };
    let (header, start) = header(mapping.bytes()).map_err(bad)?;
    let (shape, dtype) = array(header).map_err(bad)?;
    let numbers = shape.iter().try_fold(1usize, |product, len| product.checked_mul(*len));
    let len = numbers.and_then(|numbers| numbers.checked_mul(dtype.size()));
    let end = len.and_then(|len| start.checked_add(len));
    match end {
        Some(end) if end == mapping.bytes().len() => {
            Ok(Tensor::mapped(&shape, mapping, start..end, dtype))
        }
        _ => Err(bad(format!(
            "an array of shape {shape:?} does not fill the {} bytes after the header",
            mapping.bytes().len() - start
        ))),
    }
}

/// The dictionary that describes the array, and where the numbers begin.
fn header(bytes: &[u8]) -> std::result::Result<(&str, usize), String> {
    let damaged = || "not a whole .npy file".to_string();
    let rest = bytes.strip_prefix(MAGIC).ok_or_else(damaged)?;
    let (start, len): (usize, usize) = match rest {
        [1, _, a, b, ..] => (10, usize::from(u16::from_le_bytes([*a, *b]))),
        [2 | 3, _, a, b, c, d, ..] => (12, u32::from_le_bytes([*a, *b, *c, *d]) as usize),
        _ => return Err(damaged()),
    };
    let header = bytes.get(start..start.saturating_add(len)).ok_or_else(damaged)?;
    Ok((std::str::from_utf8(header).map_err(|_| damaged())?, start + len))
}

/// Shape and number type of the array that a header such as
/// `{'descr': '<f4', 'fortran_order': False, 'shape': (3, 4), }` describes.
fn array(header: &str) -> std::result::Result<(Vec<usize>, Dtype), String> {
    let value = |key: &str| {
        let (_, rest) = header.split_once(&format!("'{key}':"))?;
        Some(rest.trim_start())
    };
    let dtype = match value("descr").and_then(|rest| rest.strip_prefix('\'')?.split_once('\'')) {
        Some(("<f4", _)) => Dtype::F32,
        Some(("<f2", _)) => Dtype::F16,
        Some((other, _)) => {
            return Err(format!(
                "its numbers are of the type {other:?}; save them by astype(\"<f4\") or \"<f2\""
            ));
        }
        None => return Err("its header names no number type".into()),
    };
    if !value("fortran_order").is_some_and(|rest| rest.starts_with("False")) {
        return Err("its array is in Fortran order; save numpy.ascontiguousarray of it".into());
    }
    let shape = value("shape").and_then(|rest| rest.strip_prefix('(')?.split_once(')'));
    let (shape, _) = shape.ok_or("its header names no shape")?;
    let lens = shape.split(',').map(str::trim).filter(|len| !len.is_empty());
    let shape = lens.map(str::parse).collect::<std::result::Result<Vec<usize>, _>>();
    Ok((shape.map_err(|_| "its shape is none of whole numbers".to_string())?, dtype))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(header: &str, numbers: &[f32]) -> Vec<u8> {
        let mut bytes = MAGIC.to_vec();
        bytes.extend([1, 0]);
        bytes.extend((header.len() as u16).to_le_bytes());
        bytes.extend(header.as_bytes());
        bytes.extend(numbers.iter().flat_map(|number| number.to_le_bytes()));
        bytes
    }

    #[test]
    fn arrays_of_floats_are_read_and_others_refused() {
        let path = std::env::temp_dir().join(format!("sidereal-{}.npy", std::process::id()));
        let read = |bytes: &[u8]| {
            std::fs::write(&path, bytes).expect("a writable folder");
            let tensor = open(&path);
            std::fs::remove_file(&path).expect("the file of this test");
            tensor.map(|tensor| (tensor.shape().to_vec(), tensor.to_vec()))
        };
        let good = "{'descr': '<f4', 'fortran_order': False, 'shape': (2, 2), }\n";
        let numbers = [1.0, 2.0, 3.0, 4.0];
        let (shape, values) = read(&file(good, &numbers)).expect("an array");
        assert_eq!((&shape[..], &values[..]), (&[2, 2][..], &numbers[..]));
        for (header, numbers) in [
            (good, &numbers[..3]),
            ("{'descr': '<f8', 'fortran_order': False, 'shape': (2, 2), }", &numbers[..]),
            ("{'descr': '<f4', 'fortran_order': True, 'shape': (2, 2), }", &numbers[..]),
            ("{'descr': '<f4', 'fortran_order': False, 'shape': (2, x), }", &numbers[..]),
            (
                "{'descr': '<f4', 'fortran_order': False, 'shape': (99999999999, 99999999999), }",
                &[],
            ),
            ("{}", &[]),
        ] {
            assert!(matches!(read(&file(header, numbers)), Err(Error::WeightsFile { .. })));
        }
        let whole = file(good, &numbers);
        for end in 0..whole.len() {
            assert!(read(&whole[..end]).is_err(), "{end} bytes");
        }
    }
}
