//! Zip archives whose files are stored as they are, as `torch.save` writes them.
//!
//! The directory is at the archive's end (PKWARE's APPNOTE.TXT, 4.3). Files that are compressed are
//! refused: they could not be mapped, and torch writes none.

use std::collections::BTreeMap;
use std::ops::Range;

const END: u32 = 0x0605_4b50;
const END_64: u32 = 0x0606_4b50;
const LOCATOR_64: u32 = 0x0706_4b50;
const ENTRY: u32 = 0x0201_4b50;
const LOCAL: u32 = 0x0403_4b50;

const END_LEN: usize = 22;
const LOCATOR_64_LEN: usize = 20;
const ENTRY_LEN: usize = 46;
const LOCAL_LEN: usize = 30;
/// Of a field of an entry whose number stands in the entry's extra field.
const IN_EXTRA: u64 = 0xffff_ffff;

/// Where the archive's files lie in its bytes, by name; or what is wrong with it.
pub(super) fn files(bytes: &[u8]) -> Result<BTreeMap<String, Range<usize>>, String> {
    let (mut at, count) = directory(bytes)?;
    let mut files = BTreeMap::new();
    for _ in 0..count {
        let entry = slice(bytes, at, ENTRY_LEN)?;
        if u32_at(entry, 0) != ENTRY {
            return Err("its directory is damaged".into());
        }
        let name_len = usize::from(u16_at(entry, 28));
        let extra_len = usize::from(u16_at(entry, 30));
        let comment_len = usize::from(u16_at(entry, 32));
        let name = slice(bytes, at + ENTRY_LEN, name_len)?;
        let name = String::from_utf8_lossy(name).into_owned();
        let extra = slice(bytes, at + ENTRY_LEN + name_len, extra_len)?;
        let short = [u32_at(entry, 24), u32_at(entry, 20), u32_at(entry, 42)].map(u64::from);
        let [len, stored_len, local] = long_numbers(short, extra)?;
        if u16_at(entry, 10) != 0 || len != stored_len {
            return Err(format!("{name:?} in it is compressed, which torch.save never does"));
        }
        let (len, local) = (as_usize(len)?, as_usize(local)?);
        let head = slice(bytes, local, LOCAL_LEN)?;
        if u32_at(head, 0) != LOCAL {
            return Err(format!("{name:?} in it is damaged"));
        }
        let skipped = usize::from(u16_at(head, 26)) + usize::from(u16_at(head, 28));
        let start = local + LOCAL_LEN + skipped;
        slice(bytes, start, len)?;
        if files.insert(name.clone(), start..start + len).is_some() {
            return Err(format!("{name:?} is in it twice"));
        }
        at += ENTRY_LEN + name_len + extra_len + comment_len;
    }
    Ok(files)
}

/// Where the directory begins, and how many entries it has.
fn directory(bytes: &[u8]) -> Result<(usize, u64), String> {
    let last = bytes.len().checked_sub(END_LEN).ok_or("it is too short for an archive")?;
    // A comment of at most 65535 bytes may follow the end record.
    let first = last.saturating_sub(usize::from(u16::MAX));
    let end = (first..=last).rev().find(|&at| u32_at(bytes, at) == END);
    let end = end.ok_or("the end of the archive is missing: it is cut short")?;
    let (count, start) = (u64::from(u16_at(bytes, end + 10)), u64::from(u32_at(bytes, end + 16)));
    let locator = end.checked_sub(LOCATOR_64_LEN);
    let locator = locator.filter(|&at| u32_at(bytes, at) == LOCATOR_64);
    let Some(locator) = locator else { return Ok((as_usize(start)?, count)) };
    let end = as_usize(u64_at(bytes, locator + 8))?;
    let record = slice(bytes, end, 56)?;
    if u32_at(record, 0) != END_64 {
        return Err("its directory is damaged".into());
    }
    Ok((as_usize(u64_at(record, 48))?, u64_at(record, 32)))
}

/// The three numbers of an entry, those that do not fit taken from its extra field.
fn long_numbers(mut numbers: [u64; 3], extra: &[u8]) -> Result<[u64; 3], String> {
    let mut rest = extra;
    while rest.len() >= 4 {
        let (id, len) = (u16_at(rest, 0), usize::from(u16_at(rest, 2)));
        let field = slice(rest, 4, len)?;
        if id == 1 {
            let mut longs = field.as_chunks::<8>().0.iter();
            for number in numbers.iter_mut().filter(|number| **number == IN_EXTRA) {
                let long = longs.next().ok_or("its directory is damaged")?;
                *number = u64::from_le_bytes(*long);
            }
        }
        rest = &rest[4 + len..];
    }
    Ok(numbers)
}

fn slice(bytes: &[u8], start: usize, len: usize) -> Result<&[u8], String> {
    let end = start.checked_add(len);
    let slice = end.and_then(|end| bytes.get(start..end));
    slice.ok_or_else(|| "it points outside itself: it is cut short or damaged".into())
}

fn as_usize(number: u64) -> Result<usize, String> {
    usize::try_from(number).map_err(|_| "it points outside itself".into())
}

fn u16_at(bytes: &[u8], at: usize) -> u16 {
    u16::from_le_bytes([bytes[at], bytes[at + 1]])
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from(u16_at(bytes, at)) | u32::from(u16_at(bytes, at + 2)) << 16
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from(u32_at(bytes, at)) | u64::from(u32_at(bytes, at + 4)) << 32
}
