//! Thoughts: tokens that a model draws until it stops, and what follows them.

#[path = "common/folders.rs"]
mod folders;

use std::collections::{HashMap, HashSet};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use folders::{Folder, QWEN3, T5};
use serde_json::json;
use sidereal::wire::{RequestDefaults, RequestLine};
use sidereal::{
    Answer, Engine, EngineOptions, Forced, Merge, NamedToken, Request, Sampling, Think, Thought,
};

/// Checkpoints, and how many tokens they have.
const CASES: [(&str, u32); 2] = [(QWEN3, VOCABULARY), (T5, 1034)];
const VOCABULARY: u32 = 876;

fn prompt() -> Vec<u32> {
    (20..50).collect()
}

fn named(tokens: impl IntoIterator<Item = u32>) -> Vec<NamedToken> {
    tokens.into_iter().map(NamedToken::Id).collect()
}

/// A request that thinks at most so long, and ends at one of every eight tokens or at one alone.
fn thinker(max_tokens: usize, seed: u64, is_short: bool) -> Request {
    let stop = named((5..VOCABULARY).step_by(if is_short { 8 } else { 1000 }));
    let mut sampling = Sampling::default();
    (sampling.seed, sampling.temperature, sampling.top_p) = (seed, 1.3, 0.95);
    sampling.repetition_penalty = 1.1;
    Request::from_tokens(prompt()).with_think(Think::new(max_tokens, stop).with_sampling(sampling))
}

fn ask(engine: &mut Engine, request: &Request) -> Answer {
    engine.recommend(request).expect("a sound request")
}

fn only_thought(answer: &Answer) -> Thought {
    assert_eq!(answer.thoughts.len(), 1);
    answer.thoughts[0].clone()
}

/// A request that does not think: all beams write the thought's tokens, and then others.
fn forced(request: &Request, thought: &Thought, then: &[u32]) -> Request {
    let tokens = [&thought.tokens[..], then].concat();
    let mut second = request.clone();
    second.think = None;
    match tokens.is_empty() {
        true => second,
        false => second.with_forced(Forced::new(tokens)),
    }
}

#[test]
fn branches_are_searched_each_behind_its_own_thought_and_merged() {
    const BRANCHES: usize = 5;
    for (case, _) in CASES {
        let mut engine = Folder::of(case).open().expect("a checkpoint");
        for (seed, is_short, merge) in
            [(0, true, Merge::Max), (1, false, Merge::Max), (2, true, Merge::Mean)]
        {
            let one = thinker(40, seed, is_short)
                .with_forced(Forced::new([9]))
                .with_beams(30)
                .with_top_k(12);
            let think = one.think.clone().expect("it thinks").with_branches(BRANCHES, merge);
            let answer = ask(&mut engine, &one.clone().with_think(think.clone()));
            assert_eq!(answer.thoughts.len(), BRANCHES);
            let distinct: HashSet<_> = answer.thoughts.iter().map(|it| &it.tokens).collect();
            assert!(is_short || distinct.len() == BRANCHES, "{:?}", answer.thoughts);
            assert_eq!(only_thought(&ask(&mut engine, &one)), answer.thoughts[0], "{case}");
            // By item: the score of each branch that finds it.
            let mut scores: HashMap<String, Vec<(usize, f32)>> = HashMap::new();
            for (branch, thought) in answer.thoughts.iter().enumerate() {
                let request = forced(&one, thought, &[5, 9]).with_top_k(30);
                for item in ask(&mut engine, &request).items {
                    scores.entry(item.item).or_default().push((branch, item.score));
                }
            }
            assert_eq!(answer.items.len(), 12);
            let merged = |scores: &[(usize, f32)]| match merge {
                Merge::Max => scores.iter().map(|(_, score)| *score).fold(f32::MIN, f32::max),
                Merge::Mean => {
                    let sum: f64 = scores.iter().map(|(_, score)| f64::from(*score).exp()).sum();
                    (sum / BRANCHES as f64).ln() as f32
                }
            };
            let mut best: Vec<f32> = scores.values().map(|scores| merged(scores)).collect();
            best.sort_by(|a, b| b.total_cmp(a));
            for (item, best) in answer.items.iter().zip(best) {
                let own = &scores[&item.item];
                let difference = (item.score - merged(own)).abs().max((item.score - best).abs());
                assert!(difference < 1e-4, "{case} {item:?}: {own:?}, place {best}");
                let branch = item.branch.expect("there are several");
                let (_, of_branch) =
                    own.iter().find(|(number, _)| *number == branch).expect("it was found there");
                assert!(own.iter().all(|(_, score)| *score < of_branch + 1e-4), "{item:?} {own:?}");
            }
            let names: HashSet<&str> = answer.items.iter().map(|item| &*item.item).collect();
            assert_eq!(names.len(), 12, "an item is listed once");
            engine.check_integrity().expect("no page is lost");
            // The order of candidates is merged likewise.
            let candidates: Vec<String> = names.iter().map(|name| name.to_string()).collect();
            let ranked = ask(&mut engine, &one.with_think(think).with_candidates(candidates));
            assert_eq!(ranked.items.len(), 12);
        }
    }
}

/// The checkpoint with a tokenizer of as many texts beside it.
fn with_tokenizer() -> Folder {
    let folder = Folder::of(QWEN3);
    let texts = (0..VOCABULARY).map(|token| (text_of(token), token));
    let texts: serde_json::Map<String, serde_json::Value> =
        texts.map(|(text, token)| (text, token.into())).collect();
    let tokenizer = json!({"version": "1.0", "added_tokens": [], "decoder": {"type": "Fuse"},
        "model": {"type": "WordLevel", "vocab": texts, "unk_token": text_of(0)}});
    folder.write("tokenizer.json", tokenizer.to_string());
    folder
}

/// Letters alone: `|ab`, with a letter for each digit of the token's number.
fn text_of(token: u32) -> String {
    let letters = token.to_string().bytes().map(|digit| char::from(digit - b'0' + b'a')).collect();
    ["|", &String::from_iter::<Vec<char>>(letters)].concat()
}

#[test]
fn a_thought_ends_behind_a_text_and_its_text_before_it() {
    let folder = with_tokenizer();
    let mut engine = folder.open().expect("a checkpoint");
    let free = thinker(60, 3, false);
    let whole = only_thought(&ask(&mut engine, &free));
    assert_eq!((whole.tokens.len(), whole.is_complete), (60, false));
    let text = whole.text.expect("there is a tokenizer");
    assert_eq!(text, whole.tokens.iter().map(|&token| text_of(token)).collect::<String>());
    // From the middle of one token into that of the next.
    let (seventh, eighth) = (text_of(whole.tokens[7]), text_of(whole.tokens[8]));
    let stop = format!("{}{}", &seventh[2..], &eighth[..2]);
    let at = text.find(&stop).expect("it was written");
    for stop_token in [true, false] {
        let mut think = free.think.clone().expect("it thinks").with_stop_texts([&stop]);
        think.stop.retain(|_| stop_token);
        let request = free.clone().with_think(think.clone()).with_beams(9).with_top_k(9);
        let answer = ask(&mut engine, &request);
        let thought = only_thought(&answer);
        assert!(thought.is_complete);
        assert_eq!(thought.text.as_deref(), Some(&text[..at]));
        let written: String = thought.tokens.iter().map(|&token| text_of(token)).collect();
        assert!(written.contains(&stop) && text.starts_with(&written), "{written}");
        // What follows stands right behind it, with no stop token between.
        let expected = ask(&mut engine, &forced(&request, &thought, &[]));
        for (found, expected) in answer.items.iter().zip(&expected.items) {
            assert_eq!(found.item, expected.item);
            assert!((found.score - expected.score).abs() < 1e-4, "{found:?}, not {expected:?}");
        }
        // A thought that is too long ends, too: behind the stop token, where there is one.
        think.max_tokens = 4;
        let request = request.with_think(think);
        let answer = ask(&mut engine, &request);
        let thought = only_thought(&answer);
        assert_eq!((thought.tokens.len(), thought.is_complete), (4, false));
        let then = [5];
        let then = if stop_token { &then[..] } else { &[] };
        let expected = ask(&mut engine, &forced(&request, &thought, then));
        assert!((answer.items[0].score - expected.items[0].score).abs() < 1e-4);
    }
}

#[test]
fn a_search_behind_a_thought_is_that_of_a_request_with_the_thought_in_it() {
    let (mut complete, mut cut, mut longest) = (0, 0, 0);
    for (case, _) in CASES {
        let mut engine = Folder::of(case).open().expect("a checkpoint");
        for seed in 0..12 {
            let forced = vec![9, 11 + seed as u32];
            let is_short = seed < 8;
            let request = thinker(if is_short { 30 } else { 200 }, seed, is_short)
                .with_forced(Forced::new(forced.clone()))
                .with_beams(20)
                .with_top_k(20);
            let answer = ask(&mut engine, &request);
            let thought = only_thought(&answer);
            assert!(
                !thought
                    .tokens
                    .iter()
                    .any(|token| is_short && *token < VOCABULARY && token % 8 == 5),
                "{thought:?}"
            );
            longest = longest.max(thought.tokens.len());
            match thought.is_complete {
                true => complete += 1,
                false => cut += 1,
            }
            // The same in a second request, as tokens that every beam must write.
            let all = [&thought.tokens[..], &[5], &forced].concat();
            let mut second = request.clone().with_forced(Forced::new(all.clone()));
            second.think = None;
            let expected = ask(&mut engine, &second);
            assert_eq!(answer.items.len(), expected.items.len(), "{case} {seed}");
            for (found, expected) in answer.items.iter().zip(&expected.items) {
                assert_eq!(found.item, expected.item, "{case} {seed}");
                let difference = (found.score - expected.score).abs();
                assert!(difference < 1e-4, "{case} {seed}: {difference}");
            }
            // Named tokens behind the thought, too.
            let read = named([7, 300, 799]);
            let found = ask(&mut engine, &request.clone().with_read(read.clone()));
            let expected = ask(&mut engine, &second.with_read(read));
            assert_eq!(only_thought(&found), thought, "{case} {seed}");
            for (found, expected) in found.read.iter().zip(&expected.read) {
                let difference = (found.log_prob - expected.log_prob).abs();
                assert!(difference < 1e-4, "{case} {seed}: {difference}");
            }
        }
    }
    assert!(complete > 5 && cut > 5 && longest == 200, "{complete} {cut} {longest}");
}

#[test]
fn a_thought_without_noise_takes_the_likeliest_token_each_time() {
    for (case, vocab_size) in CASES {
        let mut engine = Folder::of(case).open().expect("a checkpoint");
        let mut sampling = Sampling::default();
        sampling.temperature = 0.0;
        let think = Think::new(12, named([799])).with_sampling(sampling);
        let request = Request::from_tokens(prompt()).with_think(think).with_read(named([1]));
        let thought = only_thought(&ask(&mut engine, &request));
        let mut written: Vec<u32> = Vec::new();
        for &token in &thought.tokens {
            let mut request = Request::from_tokens(prompt()).with_read(named(0..vocab_size));
            if !written.is_empty() {
                request = request.with_forced(Forced::new(written.clone()));
            }
            let read = ask(&mut engine, &request).read;
            let best = read.iter().max_by(|a, b| a.log_prob.total_cmp(&b.log_prob));
            assert_eq!(best.expect("a vocabulary").token, token, "{case} after {written:?}");
            written.push(token);
        }
        assert!(written.len() == 12 || thought.is_complete, "{thought:?}");
    }
}

#[test]
fn thoughts_have_the_same_bits_alone_and_in_a_crowd_and_other_seeds_draw_others() {
    for (case, _) in CASES {
        let folder = Folder::of(case);
        let mut requests: Vec<Request> =
            (0..12).map(|seed| thinker(40, seed, seed % 2 == 0).with_beams(7)).collect();
        requests.extend((0..6).map(|at| Request::from_tokens(prompt()).with_beams(5 + at)));
        let mut alone = folder.open().expect("a checkpoint");
        let expected: Vec<Answer> =
            requests.iter().map(|request| ask(&mut alone, request)).collect();
        let thoughts = expected.iter().flat_map(|answer| &answer.thoughts);
        let distinct: HashSet<_> = thoughts.map(|thought| thought.tokens.clone()).collect();
        // Short ones may end at once, and then they are alike.
        assert!(distinct.len() >= 8, "{case}: {distinct:?}");
        let mut crowd = folder.open().expect("a checkpoint");
        let mut num_answers = 0;
        crowd.recommend_all(&requests, |index, answer| {
            assert_eq!(answer.expect("a sound request"), expected[index], "{case} {index}");
            num_answers += 1;
        });
        assert_eq!(num_answers, requests.len());
        crowd.check_integrity().expect("no page is lost");
    }
}

/// A thinker has one beam for most of its time: it keeps the rows of its search from nobody.
#[test]
fn many_thinkers_keep_no_short_request_waiting() {
    let options = EngineOptions::default().with_threads(1).with_rows_per_step(100);
    let mut engine = Folder::of(QWEN3).open_as(&options).expect("a checkpoint");
    let requests: Vec<Request> =
        (0..30).map(|seed| thinker(150, seed, false).with_beams(20)).collect();
    let expected: Vec<Answer> = requests.iter().map(|it| ask(&mut engine, it)).collect();
    let answers = Arc::new(Mutex::new(HashMap::new()));
    for (index, request) in requests.iter().enumerate() {
        let answers = Arc::clone(&answers);
        let keep = move |answer| drop(answers.lock().expect("no panic").insert(index, answer));
        engine.submit(request.clone(), keep).expect("a sound request");
    }
    for _ in 0..20 {
        engine.step().expect("a sound step");
    }
    assert_eq!(engine.status().running, 30, "all think at once");
    let is_answered = Arc::new(AtomicBool::new(false));
    let told = Arc::clone(&is_answered);
    let short = Request::from_tokens(prompt()).with_beams(20);
    engine.submit(short, move |_| told.store(true, Ordering::Relaxed)).expect("a sound request");
    let mut num_steps = 0;
    while !is_answered.load(Ordering::Relaxed) {
        engine.step().expect("a sound step");
        num_steps += 1;
    }
    assert!(num_steps < 10, "{num_steps} steps beside thinkers");
    while engine.status().running > 0 {
        engine.step().expect("a sound step");
    }
    // They come to their searches together, take turns, and answer as they do alone.
    let answers = answers.lock().expect("no panic");
    for (index, expected) in expected.iter().enumerate() {
        assert_eq!(answers[&index].as_ref().expect("a sound request"), expected, "{index}");
    }
    engine.check_integrity().expect("no page is lost");
}

#[test]
fn a_thinker_that_is_cancelled_gives_its_pages_back() {
    check_cancelled(300);
}

#[test]
#[ignore = "a sweep; run it by name"]
fn ten_thousand_thinkers_that_are_cancelled_leave_nothing_behind() {
    check_cancelled(10_000);
}

fn check_cancelled(count: u64) {
    let mut engine = Folder::of(QWEN3).open().expect("a checkpoint");
    let free = engine.status().free_tail_pages;
    for number in 0..count {
        let request = thinker(300, number, false).with_beams(3);
        let id =
            engine.submit(request, |answer| assert!(answer.is_err())).expect("a sound request");
        for _ in 0..number % 7 {
            engine.step().expect("a sound step");
        }
        engine.cancel(id);
        assert_eq!(engine.status().free_tail_pages, free, "after {number}");
    }
    engine.check_integrity().expect("no page is lost");
}

#[test]
fn what_thoughts_do_not_have_is_refused_with_the_way_out() {
    let mut engine = Folder::of(QWEN3).open().expect("a checkpoint");
    let with = |change: &dyn Fn(&mut Sampling)| {
        let mut sampling = Sampling::default();
        change(&mut sampling);
        Request::from_tokens(prompt()).with_think(Think::new(4, named([5])).with_sampling(sampling))
    };
    let of = |think| Request::from_tokens(prompt()).with_think(think);
    let refused = [
        (with(&|it| it.temperature = -1.0), "\"temperature\" is -1"),
        (with(&|it| it.top_p = 0.0), "\"top_p\" is 0"),
        (with(&|it| it.min_p = f32::NAN), "\"min_p\" is NaN"),
        (with(&|it| it.repetition_penalty = 0.0), "\"repetition_penalty\" is 0"),
        (of(Think::new(0, named([5]))), "\"max_tokens\" is 0"),
        (of(Think::new(9, [])), "has no \"stop\""),
        (of(Think::new(9, []).with_stop_texts(["x"])), "tokenizer"),
        (of(Think::new(9, named([5])).with_branches(0, Merge::Max)), "\"branches\" is 0"),
        (of(Think::new(9, named([5])).with_branches(65, Merge::Max)), "\"branches\" is 65"),
        (
            of(Think::new(9, named([5])).with_branches(2, Merge::Max)).with_read(named([5])),
            "several branches goes without \"read\"",
        ),
        (of(Think::new(9, named([VOCABULARY]))), "token 876 is outside"),
        (thinker(9, 0, true).with_seed(1), "goes without \"seed\""),
        (thinker(9, 0, true).with_log_probs(true), "goes without \"log_probs\""),
        (thinker(9, 0, true).with_groups(["all"]), "goes without \"groups\""),
    ];
    for (request, words) in refused {
        let error = engine.recommend(&request).expect_err(words).to_string();
        assert!(error.contains(words), "{error}, not {words}");
    }
}

#[test]
fn a_line_says_what_to_think() {
    let line = json!({
        "tokens": prompt(),
        "think": {"max_tokens": 8, "stop": [5, "</think>"], "temperature": 0.6, "top_k": 50, "seed": 7,
                  "stop_texts": ["\n\n"], "branches": 3, "merge": "mean"},
    });
    let defaults = RequestDefaults::default();
    let read = |line: &str| RequestLine::parse(line).and_then(|line| line.to_request(&defaults));
    let request = read(&line.to_string()).expect("a sound line");
    let think = request.think.clone().expect("it thinks");
    assert_eq!((think.max_tokens, think.stop.len()), (8, 2));
    assert_eq!((think.sampling.temperature, think.sampling.top_k), (0.6, 50));
    assert_eq!((think.sampling.top_p, think.sampling.seed), (1.0, 7));
    assert_eq!((think.stop_texts.len(), think.branches, think.merge), (1, 3, Merge::Mean));
    // The line that says the whole request says it again.
    let again = serde_json::to_string(&request).expect("a JSON form");
    assert_eq!(read(&again).expect("a sound line"), request);
    for (think, words) in [
        (json!({"stop": [5]}), "missing field `max_tokens`"),
        (json!({"max_tokens": 8, "stop": [5], "merge": "sum"}), "unknown variant"),
        (json!({"max_tokens": -1, "stop": [5]}), "\"max_tokens\" is -1"),
        (json!({"max_tokens": 8, "stop": [5], "seed": -2}), "\"seed\" is -2"),
        (json!({"max_tokens": 8, "stop": [5], "heat": 1}), "unknown field"),
    ] {
        let error = read(&json!({"tokens": [1], "think": think}).to_string()).expect_err(words);
        assert!(error.to_string().contains(words), "{error}, not {words}");
    }
}
