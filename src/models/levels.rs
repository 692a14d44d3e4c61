//! Which token stands for which code of which level, by the texts of the tokens.
//!
//! Training scripts add a token for each code, `<a_0>`, `<a_1>` and so on, often in the order of
//! their texts (`<a_0>`, `<a_10>`, `<a_100>`, `<a_1>`) and only those that occur. The number of a
//! token therefore says nothing, and its text everything. Added tokens that differ in one number
//! alone form a group, and each level is a group.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use crate::backend::NO_TOKEN;
use crate::catalog::sid::MAX_LEVELS;
use crate::catalog::{Catalog, Snapshot};

/// The codes that a level may have.
pub const MAX_CODES: usize = u16::MAX as usize + 1;

/// Numbered tokens that tokenizers have for other purposes, by a part of their texts.
const OTHER_PURPOSES: [&str; 8] = [
    "extra_id",
    "unused",
    "reserved",
    "placeholder",
    "place▁holder",
    "dummy",
    "madeupword",
    "vision_",
];

/// The text of a level's tokens with a place for the code: `<a_{}>`, or `<a_{:03}>` where codes
/// are padded with zeros.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct CodeTemplate {
    before: String,
    /// Digits that a code has at least.
    width: usize,
    after: String,
}

impl CodeTemplate {
    /// Reads a template.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn parse(text: &str) -> Result<CodeTemplate, String> {
        let wrong = || format!("template {text:?} has no {{}} for the code");
        let start = text.find("{").ok_or_else(wrong)?;
        let end = start + text[start..].find('}').ok_or_else(wrong)?;
        let width = match &text[start + 1..end] {
            "" => 1,
            padded => {
                padded.strip_prefix(":0").and_then(|width| width.parse().ok()).ok_or_else(wrong)?
            }
        };
        let (before, after) = (text[..start].to_string(), text[end + 1..].to_string());
        Ok(CodeTemplate { before, width, after })
    }

    /// The text of a code's token.
    pub fn text(&self, code: u64) -> String {
        format!("{}{code:0width$}{}", self.before, self.after, width = self.width)
    }
}

impl fmt::Display for CodeTemplate {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.width {
            0 | 1 => write!(formatter, "{}{{}}{}", self.before, self.after),
            width => write!(formatter, "{}{{:0{width}}}{}", self.before, self.after),
        }
    }
}

/// Tokens whose texts differ in one number alone.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Group {
    /// Their text.
    pub template: CodeTemplate,
    /// By number.
    tokens: BTreeMap<u64, u32>,
}

impl Group {
    /// By code: the token, or [`NO_TOKEN`].
    pub fn by_code(&self) -> Vec<u32> {
        let size = self.tokens.keys().next_back().map_or(0, |&last| last as usize + 1);
        let mut by_code = vec![NO_TOKEN; size.min(MAX_CODES)];
        for (&number, &token) in &self.tokens {
            if let Some(place) = by_code.get_mut(number as usize) {
                *place = token;
            }
        }
        by_code
    }

    fn has(&self, codes: &BTreeSet<u16>) -> bool {
        codes.iter().all(|&code| self.tokens.contains_key(&code.into()))
    }

    fn is_for_other_purposes(&self) -> bool {
        let text = self.template.to_string().to_lowercase();
        OTHER_PURPOSES.iter().any(|part| text.contains(part))
    }
}

/// What the tokenizer's files say about levels.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Derived {
    /// By level; empty where the files do not say.
    pub levels: Vec<Group>,
    /// Groups that are no level, each with the reason.
    pub others: Vec<(Group, &'static str)>,
    /// Why `levels` is empty.
    pub reason: String,
    /// Whether an item says the order of the levels.
    pub is_order_certain: bool,
}

impl Derived {
    /// Groups that could be levels and are too many or too few.
    pub fn undecided(&self) -> impl Iterator<Item = &Group> {
        self.others.iter().filter(|(_, reason)| *reason == UNDECIDED).map(|(group, _)| group)
    }
}

/// Why a group that could be a level is none.
const UNDECIDED: &str = "it could be a level, and there are too many or too few such groups";

/// Finds the levels among added tokens. `first_item` is the texts of an item's codes where a file of
/// items writes them; a catalog says how many levels there are and which codes they need.
pub fn derive(
    added: &[(u32, String)],
    first_item: Option<&[String]>,
    catalog: Option<&Catalog>,
) -> Derived {
    let groups = groups(added);
    let mut derived = Derived::default();
    if let Some(texts) = first_item {
        let group =
            |text: &String| groups.iter().find(|group| group_has_text(group, text)).cloned();
        if let Some(levels) = texts.iter().map(group).collect::<Option<Vec<Group>>>() {
            let others = groups.into_iter().filter(|group| !levels.contains(group));
            derived.others = others.map(|group| (group, "no item is written with it")).collect();
            (derived.levels, derived.is_order_certain) = (levels, true);
            return derived;
        }
    }
    let codes = catalog.map(|catalog| codes_by_level(&catalog.snapshot()));
    let mut candidates = Vec::new();
    for group in groups {
        let reason = match &codes {
            _ if group.is_for_other_purposes() => "tokenizers number such tokens themselves",
            Some(codes) if !codes.iter().any(|codes| group.has(codes)) => {
                "the catalog has codes that it lacks, at every level"
            }
            None if group.tokens.len() < 2 => "one token alone",
            _ => {
                candidates.push(group);
                continue;
            }
        };
        derived.others.push((group, reason));
    }
    let wanted = codes.as_ref().map_or(candidates.len(), Vec::len);
    if candidates.is_empty() {
        derived.reason = "no tokens are numbered like codes".into();
    } else if candidates.len() != wanted || candidates.len() > MAX_LEVELS {
        let names: Vec<String> =
            candidates.iter().map(|group| group.template.to_string()).take(12).collect();
        let count = candidates.len();
        let most = wanted.min(MAX_LEVELS);
        derived.reason =
            format!("{count} groups of tokens could be levels, {names:?}, and {most} are needed");
        derived.others.extend(candidates.into_iter().map(|group| (group, UNDECIDED)));
    } else {
        derived.levels = candidates;
    }
    derived
}

fn codes_by_level(snapshot: &Snapshot) -> Vec<BTreeSet<u16>> {
    let levels = 0..snapshot.num_levels();
    levels.map(|level| snapshot.codes_at(level).collect()).collect()
}

fn group_has_text(group: &Group, text: &str) -> bool {
    group.tokens.keys().any(|&number| group.template.text(number) == text)
}

/// A text as what stands around its numbers, and the numbers as digits.
fn split(text: &str) -> (Vec<&str>, Vec<&str>) {
    let (mut around, mut numbers) = (Vec::new(), Vec::new());
    let (mut rest, is_digit) = (text, |c: char| c.is_ascii_digit());
    while let Some(start) = rest.find(is_digit) {
        let end = rest[start..].find(|c| !is_digit(c)).map_or(rest.len(), |len| start + len);
        around.push(&rest[..start]);
        numbers.push(&rest[start..end]);
        rest = &rest[end..];
    }
    around.push(rest);
    (around, numbers)
}

/// The numbers of a text, where they can be codes.
pub fn numbers(text: &str) -> Vec<u64> {
    split(text).1.iter().map(|digits| digits.parse().unwrap_or(u64::MAX)).collect()
}

/// Groups added tokens, in the order of their smallest tokens; levels that a number of the text
/// counts (`<sid_7_level2>`) in the order of that number.
fn groups(added: &[(u32, String)]) -> Vec<Group> {
    // Texts that are alike but for their numbers.
    let mut alike: BTreeMap<Vec<&str>, Vec<(Vec<&str>, u32)>> = BTreeMap::new();
    for (token, text) in added {
        let (around, numbers) = split(text);
        if !numbers.is_empty() {
            alike.entry(around).or_default().push((numbers, *token));
        }
    }
    let mut sorted: Vec<(u32, Vec<Group>)> = Vec::new();
    for (around, members) in alike {
        let at = code_position(&members);
        let mut by_others: BTreeMap<Vec<u64>, Vec<(&str, u32)>> = BTreeMap::new();
        let mut others_text: BTreeMap<Vec<u64>, Vec<&str>> = BTreeMap::new();
        for (numbers, token) in &members {
            let mut others = numbers.clone();
            let code = others.remove(at);
            let key: Vec<u64> =
                others.iter().map(|text| text.parse().unwrap_or(u64::MAX)).collect();
            by_others.entry(key.clone()).or_default().push((code, *token));
            others_text.insert(key, others);
        }
        let group = |(key, codes): (Vec<u64>, Vec<(&str, u32)>)| {
            group_of(&around, &others_text[&key], at, &codes)
        };
        let groups: Vec<Group> = by_others.into_iter().filter_map(group).collect();
        let first = groups.iter().flat_map(|group| group.tokens.values()).min();
        if let Some(&first) = first {
            sorted.push((first, groups));
        }
    }
    sorted.sort_by_key(|(first, _)| *first);
    sorted.into_iter().flat_map(|(_, groups)| groups).collect()
}

/// Which number of texts that are otherwise alike is the code: the one with most values, the last
/// of those.
fn code_position(members: &[(Vec<&str>, u32)]) -> usize {
    let count = members.first().map_or(0, |(numbers, _)| numbers.len());
    let values =
        |at: usize| members.iter().map(|(numbers, _)| numbers[at]).collect::<BTreeSet<_>>();
    (0..count).max_by_key(|&at| (values(at).len(), at)).unwrap_or(0)
}

fn group_of(around: &[&str], others: &[&str], at: usize, codes: &[(&str, u32)]) -> Option<Group> {
    let with_others = |range: std::ops::Range<usize>, others: &[&str]| {
        let mut text = String::new();
        for (number, part) in around[range].iter().enumerate() {
            text.push_str(part);
            text.push_str(others.get(number).unwrap_or(&""));
        }
        text
    };
    let before = with_others(0..at + 1, &others[..at]);
    let after = with_others(at + 1..around.len(), &others[at..]);
    let is_padded = codes.iter().any(|(digits, _)| digits.len() > 1 && digits.starts_with('0'));
    let width = match is_padded {
        true => codes.iter().map(|(digits, _)| digits.len()).min().unwrap_or(1),
        false => 1,
    };
    let template = CodeTemplate { before, width, after };
    let mut tokens = BTreeMap::new();
    for (digits, token) in codes {
        let number: u64 = digits.parse().ok().filter(|&number| number < MAX_CODES as u64)?;
        tokens.insert(number, *token);
    }
    Some(Group { template, tokens })
}

/// Where the text of a token says another code than its number: the first such place of a level.
///
/// Texts that count on over the levels (`<sid_256>` for code 0 of the second of two levels of 256)
/// are no contradiction; `codes_before` is the number of codes of the levels before.
pub fn contradiction(
    added: &[(u32, String)],
    level: usize,
    tokens: &[u32],
    codes_before: u64,
) -> Option<String> {
    let text = |token: &u32| {
        let place = added.partition_point(|(other, _)| other < token);
        added.get(place).filter(|(found, _)| found == token).map(|(_, text)| text.as_str())
    };
    let texts: Vec<(u64, &str)> = (0u64..)
        .zip(tokens)
        .filter_map(|(code, token)| Some((code, text(token)?)))
        .filter(|(_, text)| text.contains(|c: char| c.is_ascii_digit()))
        .collect();
    let agrees = |from_end: usize, offset: u64| {
        let number = |text: &str| numbers(text).iter().rev().nth(from_end).copied();
        texts.iter().all(|(code, text)| number(text) == Some(code + offset))
    };
    let most = texts.iter().map(|(_, text)| numbers(text).len()).max()?;
    if (0..most).any(|from_end| agrees(from_end, 0) || agrees(from_end, codes_before)) {
        return None;
    }
    let (code, text) = texts.iter().find(|(code, text)| numbers(text).last() != Some(code))?;
    let token = tokens[*code as usize];
    Some(format!(
        "level {level} takes token {token} for code {code}, and the tokenizer says that this token \
         is {text:?}; tokens were added in another order than by code. Name the level by \
         \"template\", or leave \"levels\" out"
    ))
}

/// The first level whose tokens are those of another level, by an item as its file writes it.
pub fn swapped(levels: &[Vec<u32>], derived: &Derived) -> Option<String> {
    if !derived.is_order_certain || derived.levels.len() != levels.len() {
        return None;
    }
    let shares = |group: &Group, tokens: &[u32]| {
        group.tokens.iter().any(|(&code, token)| tokens.get(code as usize) == Some(token))
    };
    levels.iter().enumerate().find_map(|(level, tokens)| {
        let other = derived.levels.iter().position(|group| shares(group, tokens))?;
        let is_swapped = other != level && !shares(&derived.levels[level], tokens);
        is_swapped.then(|| {
            let (own, found) = (&derived.levels[level].template, &derived.levels[other].template);
            format!(
                "level {level} takes the tokens {found}, and items are written with {own} at this \
                 place; put the levels in the items' order, or leave \"levels\" out"
            )
        })
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn added(texts: &[&str]) -> Vec<(u32, String)> {
        (100..).zip(texts.iter().map(|text| text.to_string())).collect()
    }

    fn templates(derived: &Derived) -> Vec<String> {
        derived.levels.iter().map(|group| group.template.to_string()).collect()
    }

    #[test]
    fn tokens_in_the_order_of_their_texts_are_found_by_their_texts() {
        let added = added(&["<a_0>", "<a_10>", "<a_2>", "<b_1>", "<b_3>", "</s>"]);
        let derived = derive(&added, None, None);
        assert_eq!(templates(&derived), ["<a_{}>", "<b_{}>"]);
        let by_code = derived.levels[0].by_code();
        assert_eq!((by_code.len(), by_code[10], by_code[2]), (11, 101, 102));
        assert_eq!(by_code[1], NO_TOKEN);
    }

    #[test]
    fn the_code_need_not_be_the_last_number() {
        let mut texts = Vec::new();
        for level in [2, 0, 1] {
            texts.extend((0..5).map(|code| format!("<sid_{code}_level{level}>")));
        }
        let texts: Vec<&str> = texts.iter().map(String::as_str).collect();
        let derived = derive(&added(&texts), None, None);
        assert_eq!(templates(&derived), ["<sid_{}_level0>", "<sid_{}_level1>", "<sid_{}_level2>"]);
    }

    #[test]
    fn codes_may_be_padded_with_zeros() {
        let derived = derive(&added(&["<a_007>", "<a_123>", "<b_010>", "<b_000>"]), None, None);
        assert_eq!(templates(&derived), ["<a_{:03}>", "<b_{:03}>"]);
        assert_eq!(derived.levels[0].by_code()[7], 100);
        let template = CodeTemplate::parse("<a_{:03}>").expect("a template");
        assert_eq!(template.text(7), "<a_007>");
    }

    #[test]
    fn tokens_of_other_purposes_are_no_levels() {
        let added = added(&["<extra_id_0>", "<extra_id_1>", "<a_0>", "<a_1>", "<b_0>", "<b_1>"]);
        assert_eq!(templates(&derive(&added, None, None)), ["<a_{}>", "<b_{}>"]);
    }

    #[test]
    fn an_item_as_it_is_written_says_the_order_of_the_levels() {
        let added = added(&["<a_0>", "<a_1>", "<b_0>", "<b_1>", "<u_0>", "<u_1>"]);
        let item = ["<b_1>".to_string(), "<a_0>".to_string()];
        assert_eq!(templates(&derive(&added, Some(&item), None)), ["<b_{}>", "<a_{}>"]);
    }

    #[test]
    fn a_token_whose_text_says_another_code_is_found() {
        let tokens: Vec<u32> = (100..103).collect();
        let of = |texts: &[&str], before| contradiction(&added(texts), 1, &tokens, before);
        let reason = of(&["<a_0>", "<a_10>", "<a_1>"], 0).expect("a contradiction");
        assert!(reason.contains("token 101") && reason.contains("<a_10>"), "{reason}");
        assert_eq!(of(&["<a_0>", "<a_1>", "<a_2>"], 0), None);
        assert_eq!(of(&["<s_0_l7>", "<s_1_l7>", "<s_2_l7>"], 0), None);
        assert_eq!(of(&["<s_256>", "<s_257>", "<s_258>"], 256), None);
        assert!(of(&["<s_256>", "<s_257>", "<s_258>"], 0).is_some());
        assert_eq!(of(&["cat", "dog", "cow"], 0), None);
    }

    #[test]
    fn levels_in_another_order_than_items_are_found() {
        let added = added(&["<a_0>", "<a_1>", "<b_0>", "<b_1>"]);
        let item = ["<a_0>".to_string(), "<b_1>".to_string()];
        let derived = derive(&added, Some(&item), None);
        let (first, second) = (vec![100, 101], vec![102, 103]);
        assert_eq!(swapped(&[first.clone(), second.clone()], &derived), None);
        assert!(swapped(&[second, first], &derived).is_some());
    }

    #[test]
    fn a_template_without_a_place_is_refused() {
        for text in ["<a_>", "<a_{", "<a_{x}>", "<a_{:0}>"] {
            assert!(CodeTemplate::parse(text).is_err(), "{text}");
        }
    }
}
