//! Requests as programs: named tokens that are read and tokens that are forced before the codes.

mod common;
#[path = "common/folders.rs"]
mod folders;

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use common::tiny::{Tiny, named, prompt, random_program, some_tokens};
use folders::{Folder, QWEN3, T5};
use serde_json::json;
use sidereal::{
    Answer, Engine, EngineOptions, Error, Forced, NamedToken, Normalization, Request, Result,
};

fn read(engine: &mut Engine, request: &Request) -> Vec<f32> {
    let answer = engine.recommend(request).expect("a sound request");
    assert_eq!(answer.read.len(), request.read.len());
    for (found, asked) in answer.read.iter().zip(&request.read) {
        assert_eq!((NamedToken::Id(found.token), found.text.as_ref()), (asked.clone(), None));
    }
    answer.read.iter().map(|token| token.log_prob).collect()
}

/// Everything that a search finds, by item.
fn scores(engine: &mut Engine, request: &Request) -> HashMap<String, f32> {
    let request = request.clone().with_beams(600).with_top_k(1000);
    let answer = engine.recommend(&request).expect("a sound request");
    answer.items.into_iter().map(|item| (item.item, item.score)).collect()
}

fn assert_close(found: f32, expected: f32, what: &str) {
    assert!((found - expected).abs() < 1e-4, "{what}: {found}, not {expected}");
}

#[test]
fn named_tokens_of_a_whole_vocabulary_sum_to_one_whatever_their_order() {
    for seed in 0..100 {
        let tiny = Tiny::new(seed);
        let mut rng = fastrand::Rng::with_seed(seed);
        let mut engine = tiny.open(1);
        let vocabulary: Vec<u32> = (0..tiny.num_tokens() + 3).collect();
        let request = Request::from_tokens(prompt(&mut rng, &tiny)).with_read(named(&vocabulary));
        let all = read(&mut engine, &request);
        let sum: f32 = all.iter().map(|log_prob| log_prob.exp()).sum();
        assert!((sum - 1.0).abs() < 1e-4, "seed {seed}: {sum}");
        // Some of them, some twice, in any order: bit by bit what they are among all.
        let mut tokens = some_tokens(&mut rng, &tiny, 12);
        tokens.push(tokens[0]);
        rng.shuffle(&mut tokens);
        let some = read(&mut engine, &request.with_read(named(&tokens)));
        let expected: Vec<f32> = tokens.iter().map(|&token| all[token as usize]).collect();
        assert_eq!(some, expected, "seed {seed}");
    }
}

#[test]
fn forced_tokens_that_count_add_their_log_probability_and_others_change_the_input_alone() {
    let mut compared = 0;
    for seed in 0..150 {
        let tiny = Tiny::new(seed);
        let mut rng = fastrand::Rng::with_seed(seed);
        let mut engine = tiny.open(1);
        let prompt = Request::from_tokens(prompt(&mut rng, &tiny));
        let forced = some_tokens(&mut rng, &tiny, 3);
        // The chain rule: each token's log-probability after those before it.
        let mut constant = 0.0;
        for (at, token) in forced.iter().enumerate() {
            let request = prompt.clone().with_read(named(&[*token]));
            constant += match at {
                0 => read(&mut engine, &request)[0],
                _ => read(&mut engine, &request.with_forced(Forced::new(&forced[..at])))[0],
            };
        }
        let request = prompt.with_forced(Forced::new(forced.clone()));
        let counted = request.clone().with_forced(Forced::counted(forced));
        for (normalization, constant) in [
            (Normalization::Vocabulary, constant),
            (Normalization::Level, 0.0),
            (Normalization::Children, 0.0),
        ] {
            let plain = request.clone().with_normalization(normalization);
            let counted = counted.clone().with_normalization(normalization);
            let (plain, counted) = (scores(&mut engine, &plain), scores(&mut engine, &counted));
            assert_eq!(plain.len(), counted.len(), "seed {seed}");
            for (item, score) in &plain {
                let what = format!("seed {seed} {normalization:?} {item}");
                assert_close(counted[item], score + constant, &what);
                compared += 1;
            }
        }
    }
    assert!(compared > 2000, "only {compared} scores were compared");
}

fn answers(engine: &mut Engine, requests: &[Request]) -> Vec<Answer> {
    let mut answers: Vec<Option<Answer>> = requests.iter().map(|_| None).collect();
    engine.recommend_all(requests, |index, answer| {
        answers[index] = Some(answer.expect("a sound request"));
    });
    answers.into_iter().map(|answer| answer.expect("all are answered")).collect()
}

#[test]
fn programs_have_the_same_bits_alone_and_in_a_crowd_with_cached_contexts() {
    let (mut num_cached, mut num_read, mut num_both) = (0, 0, 0);
    for seed in 0..60 {
        let tiny = Tiny::new(seed);
        let mut rng = fastrand::Rng::with_seed(seed);
        let prompts: Vec<Vec<u32>> = (0..3).map(|_| prompt(&mut rng, &tiny)).collect();
        let requests: Vec<Request> =
            (0..20).map(|_| random_program(&mut rng, &tiny, &prompts)).collect();
        let options = EngineOptions::default()
            .with_threads(2)
            .with_tokens_per_step(40)
            .with_rows_per_step(60);
        let mut crowd = tiny.open_as(Arc::clone(&tiny.catalog), &options);
        let together = answers(&mut crowd, &requests);
        crowd.check_integrity().expect("all pages are in one place");
        let fresh = EngineOptions::default().with_threads(1).with_prefix_cache(false);
        let mut alone = tiny.open_as(Arc::clone(&tiny.catalog), &fresh);
        for (index, (request, together)) in requests.iter().zip(&together).enumerate() {
            let alone = alone.recommend(request).expect("a sound request");
            assert_eq!(&alone, together, "seed {seed} request {index}: {request:?}");
            num_cached += usize::from(together.cached_tokens > 0);
            num_read += usize::from(!together.read.is_empty());
            let has_items = !together.items.is_empty() || !together.groups.is_empty();
            num_both += usize::from(!together.read.is_empty() && has_items);
        }
    }
    assert!(num_cached > 100 && num_read > 300 && num_both > 100, "{num_cached} {num_read}");
}

#[test]
fn read_beside_groups_or_candidates_changes_neither() {
    for seed in 0..60 {
        let tiny = Tiny::new(seed);
        let mut rng = fastrand::Rng::with_seed(seed);
        let mut engine = tiny.open(1);
        let tokens = prompt(&mut rng, &tiny);
        let tokens = named(&tokens[..1]);
        let prompts = [prompt(&mut rng, &tiny)];
        let mut searches = random_program(&mut rng, &tiny, &prompts);
        (searches.read, searches.seed, searches.log_probs) = (Vec::new(), None, false);
        searches = match rng.bool() {
            true => searches.with_groups(["tag:a", "tag:b"]).with_candidates([""; 0]),
            false => searches.with_candidates(["0"]).with_groups([""; 0]),
        };
        let alone = engine.recommend(&searches).expect("a sound request");
        let mut reads = searches.clone().with_read(tokens.clone());
        let both = engine.recommend(&reads).expect("a sound request");
        assert_eq!((&both.items, &both.groups), (&alone.items, &alone.groups), "seed {seed}");
        (reads.groups, reads.candidates) = (Vec::new(), Vec::new());
        let read = engine.recommend(&reads).expect("a sound request");
        // Tokens that count beside a search are read in steps of a beam, else in the prompt: equal
        // but for the order of sums.
        for (a, b) in read.read.iter().zip(&both.read) {
            assert!((a.log_prob - b.log_prob).abs() < 1e-5, "seed {seed}: {a:?} {b:?}");
        }
        assert!(read.items.is_empty() && read.groups.is_empty());
    }
}

#[test]
fn log_probabilities_are_those_of_codes_and_of_forced_tokens_that_count() {
    let mut num_items = 0;
    for seed in 0..60 {
        let tiny = Tiny::new(seed);
        let mut engine = tiny.open(1);
        let mut check = |forced: Option<Forced>, num_forced: usize| {
            let mut request = Request::from_tokens([1, 2]).with_log_probs(true);
            request.forced = forced;
            let answer = engine.recommend(&request).expect("a sound request");
            for item in &answer.items {
                assert_eq!(item.log_probs.len(), tiny.num_steps() + num_forced, "seed {seed}");
                let sum: f32 = item.log_probs.iter().map(|token| token.vocabulary).sum();
                assert_close(sum, item.score, &format!("seed {seed}"));
                num_items += 1;
            }
        };
        check(None, 0);
        check(Some(Forced::new([3, 4])), 0);
        check(Some(Forced::counted([3, 4])), 2);
    }
    assert!(num_items > 300, "only {num_items} items came back");
}

#[test]
fn a_program_past_its_deadline_ends_and_gives_everything_back() {
    let tiny = Tiny::new(3);
    let mut engine = tiny.open(1);
    let request = Request::from_tokens([1, 2, 3])
        .with_forced(Forced::counted([1, 2]))
        .with_read(named(&[1, 2]))
        .with_groups(["tag:a"]);
    let late = request.clone().with_deadline(Duration::ZERO);
    let error = engine.recommend(&late).expect_err("it is late");
    assert!(matches!(error, Error::DeadlineExceeded { .. }), "{error}");
    engine.check_integrity().expect("all pages are in one place");
    let in_time = request.clone().with_deadline(Duration::from_secs(600));
    let answer = engine.recommend(&in_time).expect("a sound request");
    assert_eq!(answer, engine.recommend(&request).expect("a sound request"));
    let status = engine.status();
    assert_eq!(status.free_tail_pages, status.tail_pages);
}

/// A checkpoint with a vocabulary of texts.
fn with_texts(case: &str) -> Folder {
    let folder = Folder::of(case);
    let vocabulary = json!({"Yes": 3, "No": 4, "ĠYes": 5, "beyond": 100_000});
    folder.write("tokenizer.json", json!({"model": {"vocab": vocabulary}}).to_string());
    folder
}

#[test]
fn texts_name_the_tokens_of_the_folders_tokenizer() {
    for case in [QWEN3, T5] {
        let folder = with_texts(case);
        let mut engine = folder.open().expect("a checkpoint");
        let texts = ["Yes", "No", "ĠYes", "Yes"].map(|text| NamedToken::Text(text.into()));
        let request = Request::from_tokens([60, 70]);
        let by_text = engine.recommend(&request.clone().with_read(texts)).expect("known texts");
        let by_id = request.with_read(named(&[3, 4, 5, 3]));
        let by_id = engine.recommend(&by_id).expect("known tokens");
        for (text, id) in by_text.read.iter().zip(&by_id.read) {
            assert_eq!((text.token, text.log_prob), (id.token, id.log_prob));
        }
        let texts: Vec<_> = by_text.read.iter().map(|token| token.text.as_deref()).collect();
        assert_eq!(texts, [Some("Yes"), Some("No"), Some("ĠYes"), Some("Yes")]);
    }
}

#[test]
fn the_models_own_forced_tokens_stand_before_codes_and_a_request_has_others() {
    for case in [QWEN3, T5] {
        for is_counted in [false, true] {
            let plain = Folder::of(case).open();
            let mut plain = plain.expect("a checkpoint");
            let folder = Folder::of(case);
            folder.edit("sidereal.json", |layout| {
                layout["forced"] = json!({"tokens": [9, 8], "counted": is_counted});
            });
            let mut engine = folder.open().expect("a checkpoint");
            let own = Forced::new([9, 8]);
            let own = if is_counted { Forced::counted([9, 8]) } else { own };
            let request = Request::from_tokens([60, 70, 80]).with_beams(8);
            let by_request = plain.recommend(&request.clone().with_forced(own));
            let by_request = by_request.expect("a sound request");
            assert!(!by_request.items.is_empty());
            let by_model = engine.recommend(&request).expect("a sound request");
            for (a, b) in by_model.items.iter().zip(&by_request.items) {
                assert_eq!(a.item, b.item, "{case} {is_counted}");
                assert_close(a.score, b.score, case);
            }
            let other = request.clone().with_forced(Forced::new([7]));
            let (ours, theirs) = (engine.recommend(&other), plain.recommend(&other));
            let (ours, theirs) = (ours.expect("sound"), theirs.expect("sound"));
            for (a, b) in ours.items.iter().zip(&theirs.items) {
                assert_close(a.score, b.score, case);
            }
            // Named tokens are read right after the input.
            let read = request.with_read(named(&[3]));
            let (ours, theirs) = (engine.recommend(&read), plain.recommend(&read));
            let (ours, theirs) = (ours.expect("sound"), theirs.expect("sound"));
            assert_close(ours.read[0].log_prob, theirs.read[0].log_prob, case);
        }
    }
}

#[test]
fn programs_that_cannot_be_are_refused_with_the_way_out() {
    let folder = with_texts(QWEN3);
    let mut engine = folder.open().expect("a checkpoint");
    let request = Request::from_tokens([60]);
    let mut refused = |request: Request, code: &str, words: &[&str]| {
        let error = engine.recommend(&request).expect_err("refused");
        let text = error.to_string();
        assert_eq!(error.code(), code, "{text}");
        words.iter().for_each(|word| assert!(text.contains(word), "{text} lacks {word:?}"));
    };
    let text = |text: &str| [NamedToken::Text(text.into())];
    let reads = |tokens: &[u32]| request.clone().with_read(named(tokens));
    let forces = |forced: Forced| request.clone().with_forced(forced);
    let unknown = request.clone().with_read(text("Yes please"));
    refused(unknown, "invalid_field", &["\"Yes please\"", "one token", "number"]);
    let beyond = request.clone().with_read(text("beyond"));
    refused(beyond, "invalid_field", &["read: token 100000 is outside"]);
    refused(reads(&[u32::MAX]), "invalid_field", &["read: token 4294967295 is outside"]);
    refused(reads(&[1; 5000]), "limit_exceeded", &["5000 tokens to read"]);
    refused(forces(Forced::new([])), "invalid_field", &["forced: has no tokens"]);
    refused(forces(Forced::new([u32::MAX])), "invalid_field", &["forced: token 4294967295"]);
    refused(forces(Forced::counted([1; 100_000])), "history_too_long", &["at most"]);
    refused(forces(Forced::new([1; 100_000])), "history_too_long", &["at most"]);
    for change in [
        |request: Request| request.with_filter("tag:a"),
        |request: Request| request.with_exclude(["1"]),
        |request: Request| request.with_seed(1),
        |request: Request| request.with_log_probs(true),
    ] {
        refused(change(reads(&[1])), "invalid_field", &["\"read\" replaces", "groups"]);
    }
    // Behind an encoder positions have no limit, and forced tokens take memory for beams instead.
    let mut t5 = Folder::of(T5).open().expect("a checkpoint");
    let forced = Request::from_tokens([60]).with_forced(Forced::new([1; 200_000]));
    let error = t5.recommend(&forced).expect_err("too large");
    assert!(matches!(error, Error::TooLarge { .. }), "{error}");
    let texts = Request::from_tokens([60]).with_read(text("Yes"));
    let error = t5.recommend(&texts).expect_err("no tokenizer.json");
    assert!(error.to_string().contains("no tokenizer.json"), "{error}");
    assert_eq!(error.code(), "invalid_field");
}

#[test]
fn a_layouts_forced_tokens_are_checked_when_a_model_is_opened() {
    for (forced, words) in [
        (json!({"tokens": []}), "no tokens"),
        (json!({"tokens": [1 << 30]}), "outside the vocabulary"),
        (json!({"tokens": [1], "count": true}), "unknown field `count`"),
    ] {
        let folder = Folder::of(QWEN3);
        folder.edit("sidereal.json", |layout| layout["forced"] = forced);
        let opened: Result<Engine> = folder.open();
        let error = opened.err().expect("refused");
        assert!(matches!(error, Error::ModelConfig { .. }), "{error}");
        assert!(error.to_string().contains(words), "{error}");
    }
}
