//! Filters: tags combined with and, or and not.
//!
//! ```text
//! either = both, { ("|" | "or"), both }
//! both   = single, { ("&" | "and"), single }
//! single = ("!" | "not"), single | "(", either, ")" | "all" | "tag:", name
//! name   = letters, digits and _ - . : / + @ # %, or any text in double quotes (\" and \\ inside)
//! ```
//! A tag is the set of items that carry it. Tags come and go with items, so a tag that no item
//! carries is the empty set and no error.

use std::fmt;

use crate::error::{Error, Result};

/// The deepest nesting of parentheses and negations.
const MAX_DEPTH: usize = 64;
/// The most bytes of a filter's text.
pub const MAX_FILTER_BYTES: usize = 1 << 16;
/// The most tags of a filter, repetitions counted: each is a set that is read.
pub const MAX_FILTER_TERMS: usize = 4096;

/// A parsed filter.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Filter {
    /// Every item.
    All,
    /// Items that carry a tag.
    Tag(String),
    /// Items that pass all of these filters.
    And(Vec<Filter>),
    /// Items that pass at least one of these filters.
    Or(Vec<Filter>),
    /// Items that do not pass this filter.
    Not(Box<Filter>),
}

impl Filter {
    /// Parses a filter such as `tag:garden & !(tag:adult | tag:"on sale")`.
    ///
    /// # Errors
    /// [`Error::InvalidField`] with the position of the mistake and what was expected there.
    pub fn parse(text: &str) -> Result<Filter> {
        if text.len() > MAX_FILTER_BYTES {
            let reason = format!("{} bytes long, at most {MAX_FILTER_BYTES} are read", text.len());
            return Err(Error::InvalidField { field: "filter", reason });
        }
        let mut parser = Parser { text, at: 0, depth: 0, terms: 0 };
        let filter = parser.either()?;
        match parser.peek() {
            None => Ok(filter),
            Some(_) => Err(parser.expected("\"&\", \"|\" or the end")),
        }
    }

    /// The text of a filter that an item passes where it passes both filters.
    ///
    /// # Errors
    /// [`Error::InvalidField`] where one of the texts cannot be parsed.
    pub fn both(one: &str, other: &str) -> Result<String> {
        Ok(Filter::And(vec![Filter::parse(one)?, Filter::parse(other)?]).to_string())
    }

    /// Whether an item with these tags passes.
    pub fn passes(&self, has_tag: &impl Fn(&str) -> bool) -> bool {
        match self {
            Filter::All => true,
            Filter::Tag(tag) => has_tag(tag),
            Filter::And(all) => all.iter().all(|filter| filter.passes(has_tag)),
            Filter::Or(any) => any.iter().any(|filter| filter.passes(has_tag)),
            Filter::Not(filter) => !filter.passes(has_tag),
        }
    }
}

impl fmt::Display for Filter {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut joined = |filters: &[Filter], with: &str| {
            formatter.write_str("(")?;
            for (at, filter) in filters.iter().enumerate() {
                let with = if at > 0 { with } else { "" };
                write!(formatter, "{with}{filter}")?;
            }
            formatter.write_str(")")
        };
        match self {
            Filter::And(all) => joined(all, " & "),
            Filter::Or(any) => joined(any, " | "),
            Filter::All => formatter.write_str("all"),
            Filter::Not(filter) => write!(formatter, "!{filter}"),
            Filter::Tag(tag) => {
                let tag = tag.replace('\\', "\\\\").replace('"', "\\\"");
                write!(formatter, "tag:\"{tag}\"")
            }
        }
    }
}

struct Parser<'a> {
    text: &'a str,
    at: usize,
    depth: usize,
    terms: usize,
}

impl Parser<'_> {
    fn either(&mut self) -> Result<Filter> {
        let mut any = vec![self.both()?];
        while self.takes("|") || self.takes_word("or") {
            any.push(self.both()?);
        }
        Ok(if any.len() == 1 { any.remove(0) } else { Filter::Or(any) })
    }

    fn both(&mut self) -> Result<Filter> {
        let mut all = vec![self.single()?];
        while self.takes("&") || self.takes_word("and") {
            all.push(self.single()?);
        }
        Ok(if all.len() == 1 { all.remove(0) } else { Filter::And(all) })
    }

    fn single(&mut self) -> Result<Filter> {
        self.depth += 1;
        if self.depth > MAX_DEPTH {
            let reason = format!("more than {MAX_DEPTH} parentheses and negations deep");
            return Err(Error::InvalidField { field: "filter", reason });
        }
        let filter = if self.takes("!") || self.takes_word("not") {
            Filter::Not(Box::new(self.single()?))
        } else if self.takes("(") {
            let inner = self.either()?;
            if !self.takes(")") {
                return Err(self.expected("\")\""));
            }
            inner
        } else if self.takes("tag:") {
            self.terms += 1;
            if self.terms > MAX_FILTER_TERMS {
                let reason = format!("more than {MAX_FILTER_TERMS} tags; give such items a tag");
                return Err(Error::InvalidField { field: "filter", reason });
            }
            Filter::Tag(self.name()?)
        } else if self.takes_word("all") {
            Filter::All
        } else {
            return Err(self.expected("tag:name, all, \"!\" or \"(\""));
        };
        self.depth -= 1;
        Ok(filter)
    }

    fn name(&mut self) -> Result<String> {
        let rest = &self.text[self.at..];
        let Some(quoted) = rest.strip_prefix('"') else {
            let end = rest.find(|c| !is_name_character(c)).unwrap_or(rest.len());
            if end == 0 {
                return Err(self.expected("a tag's name, in double quotes if it has other signs"));
            }
            self.at += end;
            return Ok(rest[..end].into());
        };
        let mut name = String::new();
        let mut characters = quoted.char_indices();
        while let Some((at, character)) = characters.next() {
            match character {
                '"' => {
                    self.at += at + 2; // both quotes
                    return Ok(name);
                }
                '\\' => match characters.next() {
                    Some((_, escaped @ ('"' | '\\'))) => name.push(escaped),
                    _ => {
                        self.at += at + 1;
                        return Err(self.expected("\\\" or \\\\"));
                    }
                },
                other => name.push(other),
            }
        }
        self.at = self.text.len();
        Err(self.expected("the quote's end"))
    }

    fn peek(&mut self) -> Option<char> {
        let rest = &self.text[self.at..];
        self.at += rest.len() - rest.trim_start().len();
        self.text[self.at..].chars().next()
    }

    fn takes(&mut self, sign: &str) -> bool {
        self.peek();
        let takes = self.text[self.at..].starts_with(sign);
        self.at += if takes { sign.len() } else { 0 };
        takes
    }

    fn takes_word(&mut self, word: &str) -> bool {
        self.peek();
        let rest = &self.text[self.at..];
        let takes = rest.get(..word.len()).is_some_and(|start| start.eq_ignore_ascii_case(word))
            && !rest[word.len()..].starts_with(is_name_character);
        self.at += if takes { word.len() } else { 0 };
        takes
    }

    fn expected(&self, what: &str) -> Error {
        let place = self.text[..self.at].chars().count() + 1;
        let found = self.text[self.at..].chars().next();
        let found = found.map_or("the end".to_string(), |found| format!("{found:?}"));
        let reason = format!("expected {what} at character {place}, found {found}");
        Error::InvalidField { field: "filter", reason }
    }
}

fn is_name_character(character: char) -> bool {
    character.is_alphanumeric() || "_-.:/+@#%".contains(character)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shown(text: &str) -> String {
        Filter::parse(text).expect("a sound filter").to_string()
    }

    #[test]
    fn and_binds_closer_than_or() {
        assert_eq!(shown("tag:a|tag:b&!tag:c"), r#"(tag:"a" | (tag:"b" & !tag:"c"))"#);
        assert_eq!(
            shown("(tag:a or tag:b) AND not tag:c and all"),
            r#"((tag:"a" | tag:"b") & !tag:"c" & all)"#
        );
        assert_eq!(shown(r#" tag:"home \"&\" \\garden" "#), r#"tag:"home \"&\" \\garden""#);
        assert_eq!(shown("tag:color:red-1"), r#"tag:"color:red-1""#);
    }

    #[test]
    fn the_text_of_a_filter_parses_to_the_same_filter() {
        for text in ["!(tag:a&!!tag:b)|tag:é", "all", r#"tag:"""#, "((tag:or)) | tag:and"] {
            let filter = Filter::parse(text).expect("a sound filter");
            assert_eq!(Filter::parse(&filter.to_string()).expect("sound"), filter, "{text}");
        }
    }

    #[test]
    fn errors_name_the_position() {
        let cases = [
            ("", "expected tag:name, all, \"!\" or \"(\" at character 1, found the end"),
            ("tag:a tag:b", "expected \"&\", \"|\" or the end at character 7, found 't'"),
            ("(tag:é", "expected \")\" at character 7, found the end"),
            ("tag:", "expected a tag's name"),
            ("tag:\"a", "expected the quote's end"),
            ("tag:\"a\\n\"", "expected \\\" or \\\\"),
            ("garden", "expected tag:name"),
            ("allx", "expected tag:name"),
            ("tag:a &", "found the end"),
        ];
        for (text, words) in cases {
            let error = Filter::parse(text).expect_err(text).to_string();
            assert!(error.contains(words), "{text}: {error}");
        }
        for hostile in ["(".repeat(50_000), "!".repeat(50_000), "x".repeat(MAX_FILTER_BYTES + 1)] {
            assert!(Filter::parse(&hostile).is_err());
        }
        let long = |terms: usize| Filter::parse(&vec!["tag:a"; terms].join("|"));
        assert!(long(MAX_FILTER_TERMS).is_ok());
        let error = long(MAX_FILTER_TERMS + 1).expect_err("too long").to_string();
        assert!(error.contains("more than 4096 tags"), "{error}");
    }
}
