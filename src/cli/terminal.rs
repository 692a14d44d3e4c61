//! Text of others on a terminal.

use std::borrow::Cow;

/// What stands for a character that is not shown.
const NOT_SHOWN: char = '\u{fffd}';

/// `text` on one line, without characters that steer a terminal, break a line or turn its direction:
/// titles and names come from whoever sells the items.
pub fn printable(text: &str) -> Cow<'_, str> {
    replaced(text, &[])
}

/// As [`printable`], with the line breaks that a message of several lines has.
pub fn printable_lines(text: &str) -> Cow<'_, str> {
    replaced(text, &['\n'])
}

fn replaced<'a>(text: &'a str, kept: &[char]) -> Cow<'a, str> {
    let shown = |character: char| match character {
        character if kept.contains(&character) => character,
        '\n' | '\r' | '\t' | '\u{2028}' | '\u{2029}' => ' ',
        // Marks, embeddings and isolates of writing directions, which make a text read as another one.
        '\u{61c}' | '\u{200e}' | '\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}' => {
            NOT_SHOWN
        }
        character if character.is_control() => NOT_SHOWN,
        character => character,
    };
    match text.chars().all(|character| shown(character) == character) {
        true => Cow::Borrowed(text),
        false => Cow::Owned(text.chars().map(shown).collect()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_steers_a_terminal_is_not_shown() {
        assert_eq!(printable("Lämp – 9\" 灯"), "Lämp – 9\" 灯");
        assert_eq!(printable("\x1b[31mred\x07"), "\u{fffd}[31mred\u{fffd}");
        assert_eq!(printable("\u{9b}2J a\u{7f}"), "\u{fffd}2J a\u{fffd}");
        assert_eq!(printable("one\r\ntwo\tthree"), "one  two three");
        assert_eq!(printable("\u{202e}cba\u{2069}"), "\u{fffd}cba\u{fffd}");
        assert_eq!(printable_lines("a\nb\x1b"), "a\nb\u{fffd}");
    }
}
