//! The levels of a model: as `sidereal.json` names them, or as the tokenizer's files say.

use std::collections::HashMap;
use std::io::ErrorKind;
use std::path::Path;

use serde::Deserialize;

use super::levels::{self, CodeTemplate, Derived, Group, MAX_CODES};
use super::vocabulary::Vocabulary;
use crate::backend::NO_TOKEN;
use crate::catalog::sid::MAX_LEVELS;
use crate::catalog::{Catalog, items};
use crate::error::{Error, Result};

/// One level: either the first token, or a template.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct LevelEntry {
    size: Option<usize>,
    first_token: Option<u32>,
    template: Option<String>,
    /// The number that a template has for code 0.
    #[serde(default)]
    first_number: u64,
}

/// What the levels of a folder are looked up in.
pub(super) struct Wanted<'a> {
    pub folder: &'a Path,
    pub vocabulary: &'a Vocabulary,
    pub vocab_size: usize,
    pub catalog: Option<&'a Catalog>,
}

impl Wanted<'_> {
    /// By level and code: the token, or [`NO_TOKEN`].
    ///
    /// # Errors
    /// [`Error::InvalidOption`] where the entries make no sense, or the tokenizer contradicts them;
    /// [`Error::ModelFolder`] where there are none and the tokenizer does not say the levels.
    pub fn levels(&self, entries: Option<&[LevelEntry]>) -> Result<Vec<Vec<u32>>> {
        let levels = match entries {
            Some(entries) => levels_of_file(entries, self.vocabulary, self.vocab_size)?,
            None => derived_levels(self.folder, self.vocabulary, self.catalog)?,
        };
        if let Some(entries) = entries {
            check_texts(entries, &levels, self.folder, self.vocabulary)?;
        }
        Ok(levels)
    }
}

fn invalid(reason: String) -> Error {
    Error::InvalidOption { option: "levels", reason }
}

/// Levels as the file names them.
fn levels_of_file(
    entries: &[LevelEntry],
    vocabulary: &Vocabulary,
    vocab_size: usize,
) -> Result<Vec<Vec<u32>>> {
    if entries.is_empty() || entries.len() > MAX_LEVELS {
        let found = entries.len();
        return Err(invalid(format!(
            "\"levels\" has {found} entries, 1 to {MAX_LEVELS} are possible"
        )));
    }
    let is_clear = |level: &LevelEntry| level.first_token.is_some() != level.template.is_some();
    if let Some(number) = entries.iter().position(|level| !is_clear(level)) {
        return Err(invalid(format!(
            "level {number} must have either \"first_token\" or \"template\""
        )));
    }
    let mut levels = Vec::new();
    for (number, level) in entries.iter().enumerate() {
        if let Some(size) = level.size.filter(|size| !(1..=MAX_CODES).contains(size)) {
            return Err(invalid(format!(
                "level {number} has size {size}, 1 to {MAX_CODES} are possible"
            )));
        }
        let tokens: Vec<u32> = match (&level.template, level.first_token, level.size) {
            (Some(template), ..) => {
                let template = CodeTemplate::parse(template).map_err(invalid)?;
                let token = |code: usize| {
                    vocabulary.token(&template.text(level.first_number + code as u64))
                };
                let known = |code| Ok(token(code)?.unwrap_or(NO_TOKEN));
                let mut tokens = (0..level.size.unwrap_or(MAX_CODES))
                    .map(known)
                    .collect::<Result<Vec<u32>>>()?;
                if level.size.is_none() {
                    let last = tokens.iter().rposition(|&token| token != NO_TOKEN);
                    tokens.truncate(last.map_or(0, |last| last + 1));
                }
                tokens
            }
            (None, Some(first), Some(size)) => {
                let end = first as usize + size;
                if end > vocab_size {
                    return Err(invalid(format!(
                        "level {number} ends at token {end}, outside the vocabulary of {vocab_size}"
                    )));
                }
                (first..end as u32).collect()
            }
            (None, ..) => {
                return Err(invalid(format!(
                    "level {number} needs \"size\" beside \"first_token\""
                )));
            }
        };
        if tokens.iter().all(|&token| token == NO_TOKEN) {
            return Err(invalid(format!("level {number}: no code has a token in tokenizer.json")));
        }
        levels.push(tokens);
    }
    Ok(levels)
}

/// Checks levels by their first tokens against what the tokenizer says, where it does.
fn check_texts(
    entries: &[LevelEntry],
    levels: &[Vec<u32>],
    folder: &Path,
    vocabulary: &Vocabulary,
) -> Result<()> {
    let added = known(vocabulary.added().map(<[_]>::to_vec))?;
    let mut codes_before = 0;
    for (level, (entry, tokens)) in entries.iter().zip(levels).enumerate() {
        if entry.first_token.is_some()
            && let Some(reason) = levels::contradiction(&added, level, tokens, codes_before)
        {
            return Err(invalid(reason));
        }
        codes_before += tokens.len() as u64;
    }
    let derived = derive(folder, vocabulary, None)?;
    levels::swapped(levels, &derived).map_or(Ok(()), |reason| Err(invalid(reason)))
}

/// What a vocabulary says, where it has files.
fn known<T: Default>(found: Result<T>) -> Result<T> {
    match found {
        Err(Error::Io { source, .. }) if source.kind() == ErrorKind::NotFound => Ok(T::default()),
        other => other,
    }
}

/// What the tokenizer's files of a folder say about its levels.
///
/// # Errors
/// Those of the files.
pub fn derive(
    folder: &Path,
    vocabulary: &Vocabulary,
    catalog: Option<&Catalog>,
) -> Result<Derived> {
    let added = known(vocabulary.added().map(<[_]>::to_vec))?;
    let first_item = items::first_codes_beside(folder)?;
    Ok(levels::derive(&added, first_item.as_deref(), catalog))
}

fn derived_levels(
    folder: &Path,
    vocabulary: &Vocabulary,
    catalog: Option<&Catalog>,
) -> Result<Vec<Vec<u32>>> {
    let derived = derive(folder, vocabulary, catalog)?;
    if !derived.levels.is_empty() {
        return Ok(derived.levels.iter().map(Group::by_code).collect());
    }
    let files = known(vocabulary.files().map(<[_]>::to_vec))?;
    let where_from = match files.is_empty() {
        true => "no file of a tokenizer (tokenizer.json, added_tokens.json, \
                 tokenizer_config.json) is there that would say it instead"
            .to_string(),
        false => format!("{} does not say it: {}", files.join(", "), derived.reason),
    };
    let has = match folder.join("sidereal.json").exists() {
        true => "sidereal.json has no \"levels\"",
        false => "there is no sidereal.json",
    };
    let smallest = smallest_file(&derived, catalog);
    Err(Error::ModelFolder {
        path: folder.to_path_buf(),
        reason: format!(
            "nothing says which tokens stand for the codes of semantic IDs: {has}, and \
             {where_from}. Put the tokenizer's files beside the weights, or write sidereal.json; \
             the smallest is {smallest} (docs/models.md)"
        ),
    })
}

/// The smallest `sidereal.json` for a catalog.
fn smallest_file(derived: &Derived, catalog: Option<&Catalog>) -> String {
    let sizes: Vec<usize> = match catalog.map(Catalog::snapshot) {
        Some(snapshot) => (0..snapshot.num_levels())
            .map(|level| snapshot.codes_at(level).max().map_or(1, |last| usize::from(last) + 1))
            .collect(),
        None => vec![256; 3],
    };
    let undecided: Vec<&Group> = derived.undecided().collect();
    let named = undecided.len() >= sizes.len();
    let level = |(number, size): (usize, &usize)| match named {
        true => format!("{{\"template\": \"{}\"}}", undecided[number].template),
        false => format!("{{\"size\": {size}, \"first_token\": TOKEN}}"),
    };
    let levels: Vec<String> = sizes.iter().enumerate().map(level).collect();
    let what = if named { "" } else { ", with the token of each level's code 0 for TOKEN" };
    format!("{{\"levels\": [{}]}}{what}", levels.join(", "))
}

/// Checks that tokens tell codes apart: within a level always, and between levels unless one token
/// is one code wherever it stands, which `is_shared` must say.
pub(super) fn check_tokens_of_codes(
    levels: &[Vec<u32>],
    is_shared: bool,
) -> std::result::Result<(), String> {
    // By token: the first level and code that are written with it.
    let mut codes: HashMap<u32, (usize, usize)> = HashMap::new();
    for (level, tokens) in levels.iter().enumerate() {
        for (code, &token) in tokens.iter().enumerate().filter(|&(_, &token)| token != NO_TOKEN) {
            let (other_level, other_code) = *codes.entry(token).or_insert((level, code));
            if (other_level, other_code) == (level, code) {
                continue; // the first with this token
            }
            if other_level == level {
                return Err(format!(
                    "codes {other_code} and {code} of level {level} are both token {token}, and \
                     items that differ in them could not be told apart; give each code a token of \
                     its own"
                ));
            }
            if !is_shared {
                return Err(format!(
                    "token {token} is code {other_code} of level {other_level} and code {code} of \
                     level {level}; correct \"first_token\" or \"size\", or say \
                     \"shared_codes\": true if the model was trained with one range of tokens for \
                     several levels"
                ));
            }
            if other_code != code {
                return Err(format!(
                    "token {token} is code {other_code} of level {other_level} and code {code} of \
                     level {level}; levels with \"shared_codes\" write one code with one token"
                ));
            }
        }
    }
    Ok(())
}
