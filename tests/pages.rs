//! The pages are true where a test can tell: links lead somewhere, and lists are whole.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

fn root() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
}

fn read(path: &Path) -> String {
    std::fs::read_to_string(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

fn files_in(folder: &str, extension: &str) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(root().join(folder)).expect("a folder of the repository");
    let paths = entries.map(|entry| entry.expect("a readable folder").path());
    let mut paths: Vec<PathBuf> =
        paths.filter(|path| path.extension().is_some_and(|found| found == extension)).collect();
    paths.sort();
    assert!(!paths.is_empty(), "{folder} holds no *.{extension}");
    paths
}

/// The pages for readers of the repository.
fn pages() -> Vec<PathBuf> {
    let mut pages = files_in(".", "md");
    pages.extend(files_in("docs", "md"));
    pages
}

/// The text of a page without its blocks of code.
fn prose(text: &str) -> String {
    let blocks = text.split("```").enumerate();
    blocks.filter(|(index, _)| index % 2 == 0).map(|(_, block)| block).collect()
}

/// The anchors that a page's headings get.
fn anchors(text: &str) -> BTreeSet<String> {
    let text = prose(text);
    let headings = text.lines().filter(|line| line.starts_with('#'));
    let slug = |line: &str| {
        let kept = line.trim_start_matches('#').trim().to_lowercase();
        let kept = kept.chars().filter(|&c| c.is_alphanumeric() || "-_ ".contains(c));
        kept.map(|c| if c == ' ' { '-' } else { c }).collect()
    };
    headings.map(slug).collect()
}

/// The targets of `[text](target)`.
fn links(text: &str) -> Vec<String> {
    let text = prose(text);
    let target = |rest: &str| rest.split(')').next().unwrap_or_default().to_string();
    text.split("](").skip(1).map(target).collect()
}

#[test]
fn a_link_leads_to_a_file_and_to_a_heading() {
    let mut checked = 0;
    for page in pages() {
        let text = read(&page);
        for link in links(&text) {
            if link.contains("://") {
                continue;
            }
            checked += 1;
            let (path, anchor) = link.split_once('#').unwrap_or((&link, ""));
            let target = match path {
                "" => page.clone(),
                path => page.parent().expect("a page is in a folder").join(path),
            };
            let from = page.display();
            assert!(target.exists(), "{from} links to {link}, which is not there");
            let is_found = anchor.is_empty() || anchors(&read(&target)).contains(anchor);
            assert!(is_found, "{from} links to {link}, which has no such heading");
        }
    }
    assert!(checked > 30, "only {checked} links were found");
}

#[test]
fn a_path_in_a_page_is_there() {
    const FOLDERS: [&str; 9] =
        ["src/", "tests/", "benches/", "kernels/", "docs/", "models/", "examples/", ".ci/", "cli/"];
    let mut checked = 0;
    for page in pages() {
        let name = page.file_name().expect("a page has a name");
        if name == "CHANGELOG.md" {
            continue; // names what was there once
        }
        let text = read(&page);
        // A section that walks through what does not exist yet.
        let is_planned = |section: &&str| !section.starts_with("Where further systems fit");
        let sections: String = text.split("### ").filter(is_planned).collect();
        let text = prose(&sections);
        let code = text.split('`').enumerate().filter(|(index, _)| index % 2 == 1);
        for path in code.flat_map(|(_, code)| code.split_whitespace()) {
            let is_path = FOLDERS.iter().any(|folder| path.starts_with(folder));
            let is_pattern = path.contains("FAMILY") || path.contains("/name.");
            if !is_path || is_pattern {
                continue;
            }
            checked += 1;
            let is_there = root().join(path).exists() || root().join(format!("{path}.rs")).exists();
            assert!(is_there, "{} names {path}, which is not there", page.display());
        }
    }
    assert!(checked > 40, "only {checked} paths were found");
}

#[test]
fn contributing_says_what_every_test_is_for() {
    let page = read(&root().join("CONTRIBUTING.md"));
    let (_, rest) = page.split_once("| subject | tests |").expect("the table of tests");
    let (table, _) = rest.split_once("\n\n").expect("the end of the table");
    let words: BTreeSet<&str> = table.split('`').collect();
    for file in files_in("tests", "rs") {
        let name = file.file_stem().expect("a name").to_string_lossy().into_owned();
        assert!(words.contains(&*name), "CONTRIBUTING.md has no row with `{name}`");
    }
}

#[test]
fn the_page_of_the_command_line_has_every_error_code() {
    let page = read(&root().join("docs/cli.md"));
    let source = read(&root().join("src/error.rs"));
    let (_, table) = source.split_once("\nkinds_and_codes! {\n").expect("the table of codes");
    let (table, _) = table.split_once("\n}\n").expect("the end of the table");
    let codes: Vec<&str> = table.lines().filter_map(|line| line.split('"').nth(1)).collect();
    assert!(codes.len() > 20, "only {} codes were found", codes.len());
    for code in codes {
        assert!(page.contains(&format!("`{code}`")), "docs/cli.md does not list {code:?}");
    }
}

#[test]
fn the_page_of_the_command_line_has_every_option() {
    let page = read(&root().join("docs/cli.md"));
    let mut checked = 0;
    for file in files_in("src/cli", "rs") {
        let text = read(&file);
        let mut lines = text.lines();
        while let Some(line) = lines.next() {
            if !line.trim_start().starts_with("#[arg(long") {
                continue;
            }
            let field = lines.find(|line| !line.trim_start().starts_with("#["));
            let field = field.and_then(|line| line.split(':').next()).unwrap_or_default();
            let name = field.trim().trim_start_matches("pub ").replace('_', "-");
            checked += 1;
            let file = file.display();
            assert!(page.contains(&format!("--{name}")), "docs/cli.md has no --{name} of {file}");
        }
    }
    assert!(checked > 30, "only {checked} options were found");
}

#[test]
fn one_thing_has_one_word() {
    // Words that the glossary of ARCHITECTURE.md replaces.
    const REPLACED: [&str; 8] = [
        "catalogue",
        "history cache",
        "history-cache",
        "legality",
        "restricted head",
        "compiled anew",
        "whoever",
        "likewise",
    ];
    for page in pages() {
        let name = page.file_name().expect("a page has a name");
        if name == "CHANGELOG.md" {
            continue; // names what was renamed
        }
        let text = read(&page).to_lowercase().replace("\"likewise\"", "");
        for word in REPLACED {
            assert!(!text.contains(word), "{} says {word:?}", page.display());
        }
    }
}

#[test]
fn the_readme_is_one_page_with_two_commands() {
    let text = read(&root().join("README.md"));
    assert!(text.lines().count() <= 120, "README.md has {} lines", text.lines().count());
    let (_, rest) = text.split_once("<!-- two commands -->").expect("the marker");
    let (block, _) = rest.split_once("<!-- end -->").expect("the end of the commands");
    let commands = block.lines().filter(|line| line.starts_with("cargo "));
    assert_eq!(commands.count(), 2);
}
