//! Files of items in Parquet.

use std::fs::File;
use std::path::Path;

use parquet::errors::ParquetError;
use parquet::file::reader::{FileReader, SerializedFileReader};
use parquet::record::{Field, Row};

use super::codes::{Code, to_sid};
use crate::catalog::item::Item;
use crate::error::{Error, Result};

pub(super) fn read(
    path: &Path,
    file: File,
    mut add: impl FnMut(Item) -> Result<()>,
    mut progress: impl FnMut(u64),
) -> Result<()> {
    let fail = |place: String, reason: String| Error::ItemsFile {
        path: path.to_path_buf(),
        place,
        reason,
    };
    let whole = |error: ParquetError| fail("the file".into(), error.to_string());
    let bytes = file.metadata().map_err(|error| Error::io(path, error))?.len();
    let reader = SerializedFileReader::new(file).map_err(whole)?;
    let num_rows = reader.metadata().file_metadata().num_rows().max(1) as u64;
    for (row, read) in (0u64..).zip(reader.get_row_iter(None).map_err(whole)?) {
        let place = || format!("row {row}");
        let item = read.map_err(|error| fail(place(), error.to_string()))?;
        let item = to_item(&item).and_then(&mut add);
        item.map_err(|error| fail(place(), error.to_string()))?;
        progress(bytes * (row + 1) / num_rows);
    }
    Ok(())
}

fn to_item(row: &Row) -> Result<Item> {
    let wrong = |field: &'static str, found: &Field, expected: &str| {
        let reason = format!("{found} is not {expected}");
        Error::InvalidField { field, reason }
    };
    let mut item = Item::new("", Default::default());
    let (mut codes, mut levels): (Vec<Code>, Vec<(usize, Code)>) = Default::default();
    let code = |found: &Field| match (found, whole_number(found)) {
        (Field::Str(text), _) => Ok(Code::Text(text.clone())),
        (_, Some(number)) => Ok(Code::Number(number)),
        _ => Err(wrong("sid", found, "a code, a whole number or a text such as \"<a_3>\"")),
    };
    for (name, found) in row.get_column_iter() {
        let level = name.strip_prefix("sid_").and_then(|level| level.parse().ok());
        match (name.as_str(), found) {
            (_, Field::Null) if level.is_none() => {}
            ("item", Field::Str(text)) => item.name = text.clone(),
            ("item", found) => {
                let number = whole_number(found);
                let number = number.ok_or_else(|| wrong("item", found, "a text or whole number"));
                item.name = number?.to_string();
            }
            ("sid", Field::ListInternal(list)) => {
                codes = list.elements().iter().map(code).collect::<Result<_>>()?;
            }
            ("sid", found) => return Err(wrong("sid", found, "a list of codes")),
            ("title", Field::Str(text)) => item.title = text.clone(),
            ("title", found) => return Err(wrong("title", found, "a text")),
            ("tags", Field::ListInternal(list)) => {
                let tag = |found: &Field| match found {
                    Field::Str(text) => Ok(text.clone()),
                    other => Err(wrong("tags", other, "a text")),
                };
                item.tags = list.elements().iter().map(tag).collect::<Result<_>>()?;
            }
            ("tags", found) => return Err(wrong("tags", found, "a list of texts")),
            ("available", Field::Bool(available)) => item.available = *available,
            ("available", found) => return Err(wrong("available", found, "true or false")),
            _ => {
                if let Some(level) = level {
                    levels.push((level, code(found)?));
                }
            }
        }
    }
    if codes.is_empty() {
        levels.sort_by_key(|&(level, _)| level);
        codes = levels.into_iter().map(|(_, code)| code).collect();
    }
    Ok(Item { sid: to_sid(&codes)?, ..item })
}

fn whole_number(field: &Field) -> Option<u64> {
    match *field {
        Field::Byte(number) => number.try_into().ok(),
        Field::Short(number) => number.try_into().ok(),
        Field::Int(number) => number.try_into().ok(),
        Field::Long(number) => number.try_into().ok(),
        Field::UByte(number) => Some(number.into()),
        Field::UShort(number) => Some(number.into()),
        Field::UInt(number) => Some(number.into()),
        Field::ULong(number) => Some(number),
        _ => None,
    }
}
