//! Files of items in Parquet.
//!
//! The dependency that parses them panics on some files that no program writes, and allocates what
//! a page claims to hold. So it runs where a panic ends as an error ([`quietly`]), reads the known
//! columns alone, and gets pages that were looked at first ([`Bounded`]).

use std::cell::Cell;
use std::fs::File;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::sync::{Arc, Once};

use parquet::bloom_filter::Sbbf;
use parquet::column::page::{Page, PageMetadata, PageReader};
use parquet::errors::{ParquetError, Result as ParquetResult};
use parquet::file::metadata::RowGroupMetaData;
use parquet::file::reader::{FileReader, RowGroupReader, SerializedFileReader};
use parquet::record::reader::RowIter;
use parquet::record::{Field, Row};
use parquet::schema::types::Type;

use super::codes::{Code, to_sid};
use super::jsonl::with_way_out;
use crate::catalog::item::Item;
use crate::catalog::order::ItemWeight;
use crate::error::{Error, Result};

/// The most values that a column has in one row group: sixteen tags each of a million items.
const MAX_VALUES: usize = 1 << 24;
/// The most bytes that a column of one row group takes uncompressed, by its own account.
const MAX_COLUMN_BYTES: i64 = 1 << 30;

pub(super) fn read(
    path: &Path,
    file: File,
    ignored: &[String],
    mut add: impl FnMut(Item) -> Result<()>,
    mut progress: impl FnMut(u64),
) -> Result<()> {
    let fail = |place: String, reason: String| Error::ItemsFile {
        path: path.to_path_buf(),
        place,
        reason,
    };
    let bytes = file.metadata().map_err(|error| Error::io(path, error))?.len();
    let whole = |error: ParquetError| fail("the file".into(), error.to_string());
    let reader = quietly(|| SerializedFileReader::new(file)).map_err(whole)?;
    let metadata = reader.metadata().file_metadata();
    let num_rows = metadata.num_rows().max(1) as u64;
    let columns = quietly(|| known_columns(metadata.schema(), ignored)).map_err(whole)?;
    let mut row = 0u64;
    for group in 0..reader.num_row_groups() {
        let in_group = |error: ParquetError| fail(format!("row group {group}"), error.to_string());
        let bounded = quietly(|| Bounded::new(reader.get_row_group(group)?)).map_err(in_group)?;
        let rows = quietly(|| RowIter::from_row_group(Some(columns.clone()), &bounded));
        let mut rows = rows.map_err(in_group)?;
        let mut next = || quietly(|| rows.next().transpose());
        while let Some(found) =
            next().map_err(|error| fail(format!("row {row}"), error.to_string()))?
        {
            let item = to_item(&found).and_then(&mut add);
            item.map_err(|error| fail(format!("row {row}"), error.to_string()))?;
            row += 1;
            progress(bytes.min(bytes.saturating_mul(row) / num_rows));
        }
    }
    Ok(())
}

thread_local! {
    /// Whether a panic of this thread is about to become an error.
    static IS_QUIET: Cell<bool> = const { Cell::new(false) };
}

/// Runs code of the dependency; its panic becomes an error, and is not reported beside it.
fn quietly<T>(parse: impl FnOnce() -> ParquetResult<T>) -> ParquetResult<T> {
    static HOOK: Once = Once::new();
    HOOK.call_once(|| {
        let before = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |panic| {
            if !IS_QUIET.get() {
                before(panic);
            }
        }));
    });
    IS_QUIET.set(true);
    let parsed = catch_unwind(AssertUnwindSafe(parse));
    IS_QUIET.set(false);
    parsed.unwrap_or_else(|_| {
        Err(ParquetError::General("the file is malformed, and its parser broke off".into()))
    })
}

/// The columns that items are made of. Others are an error, but for the index that pandas writes.
fn known_columns(schema: &Type, ignored: &[String]) -> ParquetResult<Type> {
    let is_known = |name: &str| Item::FIELDS.contains(&name) || level_of(name).is_some();
    let is_ignored = |name: &str| {
        name.starts_with("__index_level_") || ignored.iter().any(|ignored| ignored == name)
    };
    let mut names = schema.get_fields().iter().map(|field| field.name());
    if let Some(name) = names.find(|name| !is_known(name) && !is_ignored(name)) {
        let known = Item::FIELDS.map(|field| format!("`{field}`")).join(", ");
        let reason = format!("unknown field `{name}`, expected one of {known}, `sid_0`");
        return Err(ParquetError::General(with_way_out(reason)));
    }
    let fields = schema.get_fields().iter().filter(|field| is_known(field.name()));
    let fields: Vec<Arc<Type>> = fields.cloned().collect();
    if !fields.iter().any(|field| matches!(field.name(), "item" | "item_id")) {
        return Err(ParquetError::General("there is no column \"item\"".into()));
    }
    Type::group_type_builder(schema.name()).with_fields(fields).build()
}

/// The level of a column such as `sid_0`.
fn level_of(name: &str) -> Option<usize> {
    name.strip_prefix("sid_")?.parse().ok()
}

/// A row group whose pages are checked before anything is allocated for their values.
struct Bounded<'a>(Box<dyn RowGroupReader + 'a>);

impl<'a> Bounded<'a> {
    fn new(group: Box<dyn RowGroupReader + 'a>) -> ParquetResult<Bounded<'a>> {
        let largest = group.metadata().columns().iter().map(|column| column.uncompressed_size());
        match largest.max().unwrap_or(0) {
            ..=MAX_COLUMN_BYTES => Ok(Bounded(group)),
            bytes => Err(ParquetError::General(format!(
                "a column has {bytes} bytes, at most {MAX_COLUMN_BYTES} are read; write smaller \
                 row groups"
            ))),
        }
    }
}

impl RowGroupReader for Bounded<'_> {
    fn metadata(&self) -> &RowGroupMetaData {
        self.0.metadata()
    }

    fn num_columns(&self) -> usize {
        self.0.num_columns()
    }

    fn get_column_page_reader(&self, column: usize) -> ParquetResult<Box<dyn PageReader>> {
        let pages = self.0.get_column_page_reader(column)?;
        Ok(Box::new(BoundedPages { pages, num_values: 0 }))
    }

    fn get_column_bloom_filter(&self, column: usize) -> Option<&Sbbf> {
        self.0.get_column_bloom_filter(column)
    }

    fn get_row_iter(&self, projection: Option<Type>) -> ParquetResult<RowIter<'_>> {
        RowIter::from_row_group(projection, self)
    }
}

struct BoundedPages {
    pages: Box<dyn PageReader>,
    /// So far.
    num_values: usize,
}

impl PageReader for BoundedPages {
    fn get_next_page(&mut self) -> ParquetResult<Option<Page>> {
        let page = self.pages.get_next_page()?;
        match &page {
            None => {}
            // A dictionary's memory is taken for as many values as it claims; each takes a byte.
            Some(Page::DictionaryPage { buf, num_values, .. })
                if *num_values as usize > buf.len() =>
            {
                let reason =
                    format!("a dictionary of {} bytes claims {num_values} values", buf.len());
                return Err(ParquetError::General(reason));
            }
            Some(page) => self.num_values += page.num_values() as usize,
        }
        if self.num_values > MAX_VALUES {
            return Err(ParquetError::General(format!(
                "a column has over {MAX_VALUES} values, the most that are read; write smaller row \
                 groups"
            )));
        }
        Ok(page)
    }

    fn peek_next_page(&mut self) -> ParquetResult<Option<PageMetadata>> {
        self.pages.peek_next_page()
    }

    fn skip_next_page(&mut self) -> ParquetResult<()> {
        self.pages.skip_next_page()
    }

    fn at_record_boundary(&mut self) -> ParquetResult<bool> {
        self.pages.at_record_boundary()
    }
}

impl Iterator for BoundedPages {
    type Item = ParquetResult<Page>;

    fn next(&mut self) -> Option<ParquetResult<Page>> {
        self.get_next_page().transpose()
    }
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
        let level = level_of(name);
        match (name.as_str(), found) {
            (_, Field::Null) if level.is_none() => {}
            ("item" | "item_id", Field::Str(text)) => item.name = text.clone(),
            ("item" | "item_id", found) => {
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
            ("weight", found) => {
                let weight = number(found).ok_or_else(|| wrong("weight", found, "a number"))?;
                item.weight = ItemWeight::new(weight)?;
            }
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

fn number(field: &Field) -> Option<f32> {
    match *field {
        Field::Float(number) => Some(number),
        Field::Double(number) => Some(number as f32),
        Field::Byte(number) => Some(number.into()),
        Field::Short(number) => Some(number.into()),
        Field::Int(number) => Some(number as f32),
        Field::Long(number) => Some(number as f32),
        _ => whole_number(field).map(|number| number as f32),
    }
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
