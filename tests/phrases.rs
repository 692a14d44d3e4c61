//! Searches among phrases: titles in the place of semantic IDs.
//!
//! `models/phrases/CASE/` holds small random checkpoints, and what Hugging Face's `generate` finds
//! with them among 2,000 real titles and 80 beginnings of some. `models/phrases.py` makes them.

#![cfg(feature = "text")]

#[path = "common/folders.rs"]
mod folders;

use std::collections::HashMap;
use std::fmt::Write;
use std::sync::Arc;

use folders::{models, temp, write};
use serde::Deserialize;
use serde_json::{Value, json};
use sidereal::catalog::sid::Sid;
use sidereal::catalog::{Catalog, Change, Item};
use sidereal::{
    Answer, CatalogWriter, Constraint, EarlyStopping, Engine, EngineOptions, Error, Forced, Input,
    NamedToken, Normalization, PhraseRule, PhraseSearch, Request, WriterOptions,
};
use tempfile::TempDir;

const NUM_TITLES: usize = 2000;
/// The end of a phrase.
const END: u32 = 0;

#[derive(Deserialize)]
struct Golden {
    num_phrases: usize,
    longest: usize,
    cases: Vec<Case>,
}

#[derive(Deserialize)]
struct Case {
    input_ids: Vec<u32>,
    width: usize,
    length_penalty: f32,
    early_stopping: EarlyStopping,
    phrases: Vec<Vec<u32>>,
    scores: Vec<f32>,
}

impl Case {
    fn request(&self) -> Request {
        let rule = PhraseRule::new(PhraseSearch::Generate)
            .with_length_penalty(self.length_penalty)
            .with_early_stopping(self.early_stopping);
        Request::from_tokens(self.input_ids.clone())
            .with_beams(self.width)
            .with_top_k(usize::MAX)
            .with_phrase_rule(rule)
    }
}

/// A checkpoint with its tokenizer, and the catalog of its titles.
struct Titles {
    folder: TempDir,
    catalog: Arc<Catalog>,
    /// By item.
    titles: Vec<String>,
}

impl Titles {
    fn of(case: &str) -> Titles {
        let folder = temp();
        let from = models().join("phrases").join(case);
        for name in ["config.json", "model.safetensors", "sidereal.json"] {
            std::fs::copy(from.join(name), folder.path().join(name)).expect("a checkpoint");
        }
        let tokenizer = models().join("prompts/tokenizer.json");
        std::fs::copy(tokenizer, folder.path().join("tokenizer.json")).expect("a tokenizer");
        let items = std::fs::read_to_string(models().join("industrial/items.jsonl"));
        let items = items.expect("real items");
        let title = |line: &str| {
            let item: Value = serde_json::from_str(line).expect("an item");
            item["title"].as_str().expect("a title").to_string()
        };
        let mut titles: Vec<String> = items.lines().take(NUM_TITLES).map(title).collect();
        for number in 0..80 {
            let mut title = titles[number * 23].as_str();
            for _ in 0..1 + number % 3 {
                title = title.rsplit_once(' ').map_or(title, |(before, _)| before);
            }
            titles.push(title.to_string());
        }
        let mut lines = String::new();
        for (number, title) in titles.iter().enumerate() {
            let sid = [number % 7, number % 11, number % 13];
            let tags = [if number % 3 == 0 { "third" } else { "other" }];
            let item =
                json!({"item": number.to_string(), "sid": sid, "title": title, "tags": tags});
            writeln!(lines, "{item}").expect("a string takes all");
        }
        let path = write(&folder, "items.jsonl", lines);
        let catalog = Arc::new(Catalog::open(&path).expect("sound items"));
        Titles { folder, catalog, titles }
    }

    fn open(&self) -> Engine {
        let options = EngineOptions::default().with_threads(2);
        Engine::open(self.folder.path(), Arc::clone(&self.catalog), &options).expect("a checkpoint")
    }

    /// Whether no other item has the title of an item.
    fn is_alone(&self, item: &str) -> bool {
        let title = &self.titles[item.parse::<usize>().expect("a number")];
        self.titles.iter().filter(|other| *other == title).count() == 1
    }

    fn golden(case: &str) -> Golden {
        let path = models().join("phrases").join(case).join("golden.json");
        serde_json::from_slice(&std::fs::read(path).expect("golden answers")).expect("their form")
    }

    /// By title's tokens: the title.
    fn by_tokens(&self) -> HashMap<Vec<u32>, &str> {
        let path = self.folder.path().join("tokenizer.json");
        let tokenizer = tokenizers::Tokenizer::from_file(path).expect("a tokenizer");
        let tokens = |title: &str| {
            let encoding = tokenizer.encode(title, false).expect("a text");
            encoding.get_ids().to_vec()
        };
        self.titles.iter().map(|title| (tokens(title), title.as_str())).collect()
    }
}

/// The titles that an answer finds, best first; items with one title follow one another.
fn found(engine: &mut Engine, request: &Request) -> Vec<(String, f32)> {
    let answer = engine.recommend(&request.clone().with_titles(true)).expect("a sound request");
    let mut found: Vec<(String, f32)> = Vec::new();
    for item in answer.items {
        let title = item.title.expect("the catalog has it");
        if found.last().is_none_or(|(last, _)| *last != title) {
            found.push((title, item.score));
        }
    }
    found
}

fn check(case: &str) {
    let (titles, golden) = (Titles::of(case), Titles::golden(case));
    let mut engine = titles.open();
    let by_tokens = titles.by_tokens();
    assert_eq!(by_tokens.len(), golden.num_phrases, "the tokenizers agree");
    assert_eq!(by_tokens.keys().map(Vec::len).max(), Some(golden.longest));
    let mut compared = 0;
    for case in &golden.cases {
        let what = format!(
            "{} tokens, {} beams, penalty {}, {:?}",
            case.input_ids.len(),
            case.width,
            case.length_penalty,
            case.early_stopping
        );
        let found = found(&mut engine, &case.request());
        let expected: Vec<&str> = case.phrases.iter().map(|phrase| by_tokens[phrase]).collect();
        let titles: Vec<&str> = found.iter().map(|(title, _)| title.as_str()).collect();
        assert_eq!(titles, expected, "{what}");
        for ((title, score), expected) in found.iter().zip(&case.scores) {
            let tolerance = 1e-4 + 2e-6 * expected.abs();
            assert!(
                (score - expected).abs() < tolerance,
                "{what}: {title} {score}, not {expected}"
            );
            compared += 1;
        }
    }
    assert!(compared > 400, "only {compared} phrases were compared");
}

#[test]
fn qwen3_finds_the_titles_that_generate_finds() {
    check("qwen3");
}

#[test]
fn t5_finds_the_titles_that_generate_finds() {
    check("t5");
}

const CASES: [&str; 2] = ["qwen3", "t5"];

fn history() -> Request {
    Request::from_history(["5", "17", "300"]).with_top_k(usize::MAX)
}

fn scores(answer: &Answer) -> HashMap<String, f32> {
    answer.items.iter().map(|item| (item.item.clone(), item.score)).collect()
}

/// The sum of the log-probabilities of a phrase's tokens, each read on its own after those before.
fn chain(engine: &mut Engine, input: &[u32], phrase: &[u32]) -> f32 {
    let step = |(at, &token): (usize, &u32)| {
        let mut request = Request::from_tokens(input).with_read([NamedToken::Id(token)]);
        if at > 0 {
            request = request.with_forced(Forced::new(&phrase[..at]));
        }
        engine.recommend(&request).expect("a sound request").read[0].log_prob
    };
    phrase.iter().enumerate().map(step).sum()
}

#[test]
fn a_wide_exact_search_and_candidates_score_each_title_as_the_chain_of_its_tokens() {
    for case in CASES {
        let titles = Titles::of(case);
        let mut engine = titles.open();
        // Items 2000 to 2079 have beginnings of the titles of others.
        let items: Vec<String> =
            (0..12).flat_map(|n| [23 * n, 2000 + n]).map(|item| item.to_string()).collect();
        let search = history().with_only(items.clone()).with_beams(40);
        let searched = scores(&engine.recommend(&search).expect("a sound request"));
        let ranked = history().with_candidates(items.clone());
        let ranked = engine.recommend(&ranked).expect("a sound request");
        assert!(ranked.items.is_sorted_by(|a, b| a.score >= b.score), "best first");
        let ranked = scores(&ranked);
        assert_eq!(ranked.len(), items.len(), "{case}");
        let expected = items.iter().filter(|item| titles.is_alone(item));
        let input = engine.input_tokens(&history().input).expect("known items");
        let by_title: HashMap<&str, Vec<u32>> =
            titles.by_tokens().into_iter().map(|(tokens, title)| (title, tokens)).collect();
        let mut compared = 0;
        for item in expected {
            let title = &*titles.titles[item.parse::<usize>().expect("a number")];
            let phrase = [&by_title[title][..], &[END]].concat();
            let truth = chain(&mut engine, &input, &phrase);
            for found in [searched[item], ranked[item]] {
                assert!((found - truth).abs() < 1e-3, "{case} {title}: {found}, not {truth}");
            }
            compared += 1;
        }
        assert!(compared >= 20, "only {compared} titles were compared");
    }
}

#[test]
fn filters_exclusions_lists_and_groups_hold_for_phrases() {
    for case in CASES {
        let titles = Titles::of(case);
        let mut engine = titles.open();
        let mut ask = |request: Request| {
            let answer = engine.recommend(&request.with_beams(30)).expect("a sound request");
            answer.items.into_iter().map(|item| item.item).collect::<Vec<_>>()
        };
        let is_third = |item: &String| item.parse::<usize>().expect("a number") % 3 == 0;
        let all = ask(history());
        assert!(all.len() >= 30 && !all.iter().all(is_third), "{case}: {all:?}");
        let third = ask(history().with_filter("tag:third"));
        assert!(third.len() >= 30 && third.iter().all(is_third), "{case}: {third:?}");
        let few = ask(history().with_exclude(all[..10].to_vec()));
        assert!(few.len() >= 30 && few.iter().all(|item| !all[..10].contains(item)), "{case}");
        let only = history().with_only(["5", "6", "2001"]).with_exclude(["6"]);
        let mut only = ask(only);
        only.sort();
        assert_eq!(only, ["2001", "5"], "{case}");
        assert_eq!(ask(history().with_filter("tag:nobody")), [""; 0], "{case}");
        let groups = history().with_groups(["tag:third", "tag:other"]).with_beams(30);
        let groups = engine.recommend(&groups).expect("a sound request").groups;
        let names = |at: usize| groups[at].items.iter().map(|item| item.item.clone());
        assert_eq!(names(0).collect::<Vec<_>>(), third, "{case}");
        assert!(names(1).count() >= 30 && !names(1).any(|item| is_third(&item)), "{case}");
    }
}

#[test]
fn phrases_have_the_same_bits_alone_and_in_a_crowd() {
    for case in CASES {
        let (titles, golden) = (Titles::of(case), Titles::golden(case));
        let mut requests: Vec<Request> =
            golden.cases.iter().step_by(3).map(Case::request).collect();
        requests.push(history().with_candidates(["4", "8", "2003"]));
        requests.push(history().with_groups(["tag:third", "all"]).with_read([NamedToken::Id(7)]));
        requests.push(history().with_read([NamedToken::Id(7)]));
        let mut alone = titles.open();
        let expected: Vec<Answer> = requests
            .iter()
            .map(|request| alone.recommend(request).expect("a sound request"))
            .collect();
        let options = EngineOptions::default().with_threads(2).with_tokens_per_step(48);
        let catalog = Arc::clone(&titles.catalog);
        let mut crowd =
            Engine::open(titles.folder.path(), catalog, &options).expect("a checkpoint");
        let mut num_answers = 0;
        crowd.recommend_all(&requests, |index, answer| {
            assert_eq!(answer.expect("a sound request"), expected[index], "{case} {index}");
            num_answers += 1;
        });
        assert_eq!(num_answers, requests.len());
        crowd.check_integrity().expect("no page is lost");
    }
}

#[test]
fn items_that_appear_vanish_and_change_their_titles_are_found_as_they_are() {
    let titles = Titles::of("qwen3");
    let catalog = &titles.catalog;
    let options = WriterOptions::default().with_compact_at(usize::MAX);
    let writer = CatalogWriter::in_memory(Arc::clone(catalog), &options).expect("a thread");
    let mut engine = titles.open();
    let ask = |engine: &mut Engine, request: Request| {
        let answer = engine.recommend(&request.with_beams(20)).expect("a sound request");
        answer.items.into_iter().map(|item| (item.item, item.score)).collect::<Vec<_>>()
    };
    let before = ask(&mut engine, history());
    let title = |name: &str| titles.titles[name.parse::<usize>().expect("a number")].clone();
    let best = before[0].0.clone();
    let put = |name: &str, title: String| {
        let mut item = Item::new(name, Sid::new(&[1, 2, 3]).expect("three codes"));
        item.title = title;
        Change::Put(item)
    };
    // A new item with the title of the best stands beside it; the last of those found goes.
    let gone = before.iter().rev().find(|item| titles.is_alone(&item.0)).expect("one").0.clone();
    let delete = Change::Delete { item: gone.clone() };
    writer.apply(&[put("new", title(&best)), delete]).expect("sound changes");
    let after = ask(&mut engine, history());
    let score = |found: &[(String, f32)], name: &str| {
        found.iter().find(|(item, _)| item == name).map(|(_, score)| *score)
    };
    assert_eq!(score(&after, "new"), Some(before[0].1));
    assert_eq!((score(&after, &best), score(&after, &gone)), (Some(before[0].1), None));
    // A title that changes: the item is found by the new one alone.
    let fresh = format!("{} Fresh", title(&best));
    writer.apply(&[put(&best, fresh)]).expect("sound changes");
    let only = ask(&mut engine, history().with_only([best.clone()]));
    assert_eq!(only.len(), 1);
    assert!(only[0].1 < before[0].1, "{only:?}");
    assert_eq!(score(&ask(&mut engine, history()), "new"), Some(before[0].1));
    // Compacted, the catalog gives the same answers.
    let (kept, only) = (ask(&mut engine, history()), only);
    let items = titles.folder.path().join("compacted.sidereal");
    catalog.save(&items).expect("a writable folder");
    let compacted = Arc::new(Catalog::open(&items).expect("a sound catalog"));
    let options = EngineOptions::default().with_threads(2);
    let mut engine = Engine::open(titles.folder.path(), compacted, &options).expect("a checkpoint");
    assert_eq!(ask(&mut engine, history()), kept);
    assert_eq!(ask(&mut engine, history().with_only([best])), only);
}

#[test]
fn what_phrases_do_not_have_is_refused_with_the_way_out() {
    let titles = Titles::of("qwen3");
    let mut engine = titles.open();
    let steep = PhraseRule::new(PhraseSearch::Generate).with_length_penalty(f32::NAN);
    let refused = [
        (history().with_widths([4, 4, 4]), "beams: a list of widths"),
        (history().with_constraint(Constraint::Level), "phrases need the trie"),
        (history().with_seed(1), "seed: samples"),
        (history().with_log_probs(true), "log_probs"),
        (history().with_normalization(Normalization::Level), "phrases have no levels"),
        (history().with_phrase_rule(steep), "length_penalty"),
        (history().with_beams(0), "0"),
        (history().with_filter("tag:("), "filter"),
    ];
    for (request, words) in refused {
        let error = engine.recommend(&request).expect_err(words).to_string();
        assert!(error.contains(words), "{error}, not {words}");
    }
    let line =
        r#"{"history": ["5"], "phrase_rule": {"search": "generate", "early_stopping": "yes"}}"#;
    let error = sidereal::wire::RequestLine::parse(line).expect_err("no such rule").to_string();
    assert!(error.contains("neither false nor true nor \"never\""), "{error}");
    // Folders that say too little or too much.
    let folders = [
        (json!({"phrases": "names"}), "\"titles\" and \"items\" are possible"),
        (json!({"phrases": {"of": "titles", "text": "{{ item }}"}}), "either \"of\" or \"text\""),
        (json!({"phrases": {"of": "titles", "end": [4, 5]}}), "name it by \"end\""),
        (json!({"phrases": {"of": "titles", "end": [70000]}}), "outside the vocabulary"),
        (json!({"phrases": "titles", "suffix": [4]}), "\"suffix\""),
        (json!({"phrases": {"of": "titles", "rule": {"length_penalty": 99}}}), "length_penalty"),
    ];
    for (layout, words) in folders {
        write(&titles.folder, "sidereal.json", layout.to_string());
        let catalog = Arc::clone(&titles.catalog);
        let opened = Engine::open(titles.folder.path(), catalog, &EngineOptions::default());
        let error = opened.err().expect(words).to_string();
        assert!(error.contains(words), "{error}, not {words}");
    }
}

#[test]
fn items_without_codes_are_found_by_their_names() {
    let folder = Titles::of("qwen3").folder;
    let layout = json!({"phrases": {"of": "items", "end": [END], "rule": {"search": "exact"}}});
    write(&folder, "sidereal.json", layout.to_string());
    let names = ["7", "78", "789", "12", "123456789012345"];
    let lines: String =
        names.iter().map(|name| format!("{{\"item\": \"{name}\", \"title\": \"\"}}\n")).collect();
    let path = write(&folder, "items.jsonl", lines);
    let catalog = Arc::new(Catalog::open(&path).expect("items without codes"));
    let options = EngineOptions::default().with_threads(2);
    let mut engine = Engine::open(folder.path(), catalog, &options).expect("a checkpoint");
    let request = Request::from_text("a screw and a lamp");
    let answer = engine.recommend(&request).expect("a sound request");
    let found: Vec<&str> = answer.items.iter().map(|item| item.item.as_str()).collect();
    assert_eq!(found.len(), names.len(), "{found:?}");
    assert!(names.iter().all(|name| found.contains(name)), "{found:?}");
    // "7" is the beginning of "78" and of "789"; each has the score of its own tokens and the end.
    let scored = engine.recommend(&request.with_candidates(names)).expect("a sound request");
    assert_eq!(scores(&scored).len(), names.len());
    for item in &answer.items {
        assert!((scores(&scored)[&item.item] - item.score).abs() < 1e-4, "{}", item.item);
    }
}

#[derive(Deserialize)]
struct P5Golden {
    cases: Vec<P5Case>,
}

#[derive(Deserialize)]
struct P5Case {
    user: String,
    history: Vec<String>,
    input_ids: Vec<u32>,
    /// By item, in f64.
    scores: HashMap<String, f64>,
}

/// P5's folder, with a catalog of its items, and its golden answers (`models/p5.py`).
fn p5(folder: &TempDir) -> (Engine, P5Golden) {
    let from = models().join("phrases/p5");
    for name in ["config.json", "beauty-small.pth", "sidereal.json", "tokenizer.json"] {
        std::fs::copy(from.join(name), folder.path().join(name)).expect("a checkpoint");
    }
    let golden = std::fs::read(from.join("golden.json")).expect("golden answers");
    let golden: P5Golden = serde_json::from_slice(&golden).expect("their form");
    let items = golden.cases[0].scores.keys();
    let lines: String =
        items.map(|item| format!("{{\"item\": \"{item}\", \"title\": \"\"}}\n")).collect();
    let path = write(folder, "items.jsonl", lines);
    let catalog = Arc::new(Catalog::open(&path).expect("items without codes"));
    let options = EngineOptions::default().with_threads(2);
    (Engine::open(folder.path(), catalog, &options).expect("a checkpoint"), golden)
}

#[test]
fn p5_scores_each_item_as_its_network_in_f64() {
    let folder = temp();
    let (mut engine, golden) = p5(&folder);
    let mut requests = Vec::new();
    for case in &golden.cases {
        let request = Request::from_history(case.history.clone())
            .with_user(&case.user)
            .with_top_k(usize::MAX)
            .with_beams(600);
        let mut as_tokens = request.clone();
        as_tokens.input = Input::Tokens(case.input_ids.clone());
        let ranked = request.clone().with_candidates(case.scores.keys().cloned());
        requests.extend([request, as_tokens, ranked]);
    }
    // All at once, so that several prompts share a pass.
    let mut answers: Vec<Option<Answer>> = requests.iter().map(|_| None).collect();
    engine.recommend_all(&requests, |index, answer| {
        answers[index] = Some(answer.expect("a sound request"));
    });
    let mut worst: f64 = 0.0;
    for (index, answer) in answers.iter().enumerate() {
        let (case, answer) = (&golden.cases[index / 3], answer.as_ref().expect("answered"));
        assert_eq!(answer.tokens, case.input_ids.len());
        assert_eq!(answer.items.len(), case.scores.len(), "user {}", case.user);
        for item in &answer.items {
            worst = worst.max((f64::from(item.score) - case.scores[&item.item]).abs());
        }
    }
    assert!(worst < 1e-4, "a score is off by {worst}");
}

#[test]
fn a_prompt_of_more_words_than_p5_has_embeddings_for_is_refused() {
    let folder = temp();
    let (mut engine, golden) = p5(&folder);
    let items: Vec<String> = golden.cases[0].scores.keys().take(60).cloned().collect();
    let request = Request::from_history(items).with_user("7");
    let error = engine.recommend(&request).expect_err("too many words");
    assert!(matches!(error, Error::LimitExceeded { max: 63, .. }), "{error}");
}
