//! What must hold of every answer, on thousands of random requests to random small models.

mod common;

use std::collections::BTreeMap;
use std::sync::Mutex;

use common::tiny::Tiny;
use sidereal::catalog::Catalog;
use sidereal::catalog::sid::Sid;
use sidereal::{Answer, Constraint, Engine, Input, Normalization, Request, SharedSid};

const MODELS: u64 = 260;
const REQUESTS_PER_MODEL: usize = 40; // 10,400 cases

fn random_request(rng: &mut fastrand::Rng, catalog: &Catalog) -> Request {
    let items = catalog.num_items() as u32;
    let history = (0..rng.usize(1..12)).map(|_| catalog.name(rng.u32(0..items)).to_string());
    let mut request = Request::from_history(history.collect::<Vec<String>>());
    let share = if rng.bool() { 0.0 } else { rng.f32() };
    let excluded = (0..items).filter(|_| rng.f32() < share).collect::<Vec<u32>>();
    request.exclude = excluded.iter().map(|&item| catalog.name(item).to_string()).collect();
    request.beams = rng.usize(1..30);
    request.top_k = usize::MAX;
    request.normalization = Some(match rng.u8(0..3) {
        0 => Normalization::Vocabulary,
        1 => Normalization::Level,
        _ => Normalization::Children,
    });
    if rng.u8(0..4) == 0 {
        request.temperature = 0.25 + 2.0 * rng.f32();
    }
    request
}

/// The items that a request allows, by semantic ID.
fn allowed(catalog: &Catalog, request: &Request) -> BTreeMap<Sid, Vec<u32>> {
    let mut allowed: BTreeMap<Sid, Vec<u32>> = BTreeMap::new();
    for item in 0..catalog.num_items() as u32 {
        if catalog.is_available(item)
            && !request.exclude.iter().any(|name| name == catalog.name(item))
        {
            allowed.entry(catalog.sid(item)).or_default().push(item);
        }
    }
    allowed
}

fn for_each_model(mut check: impl FnMut(u64, &Tiny, &Engine, &[Request], &[Answer])) {
    for seed in 0..MODELS {
        let tiny = Tiny::new(seed);
        let mut rng = fastrand::Rng::with_seed(seed ^ 0xbea);
        let engine = tiny.open(1);
        let requests: Vec<Request> =
            (0..REQUESTS_PER_MODEL).map(|_| random_request(&mut rng, &tiny.catalog)).collect();
        let answer = |request| engine.recommend(request).expect("a sound request");
        let answers: Vec<Answer> = requests.iter().map(answer).collect();
        check(seed, &tiny, &engine, &requests, &answers);
    }
}

#[test]
fn answers_are_legal_complete_and_in_order() {
    for_each_model(|seed, tiny, _, requests, answers| {
        for (request, answer) in requests.iter().zip(answers) {
            let what = format!("seed {seed} {request:?}");
            let mut allowed = allowed(&tiny.catalog, request);
            let expected = request.beams.min(allowed.len());
            let mut sids: Vec<(Sid, f32)> = Vec::new();
            let mut items: BTreeMap<Sid, Vec<u32>> = BTreeMap::new();
            for found in &answer.items {
                assert_eq!(found.sid, tiny.catalog.sid(found.item), "{what}");
                if sids.last().is_none_or(|(sid, _)| *sid != found.sid) {
                    sids.push((found.sid, found.score));
                }
                items.entry(found.sid).or_default().push(found.item);
            }
            assert_eq!(sids.len(), expected, "{what}: as many semantic IDs as there can be");
            assert_eq!(items.len(), expected, "{what}: each of them once");
            for pair in sids.windows(2) {
                let in_order =
                    pair[0].1 > pair[1].1 || (pair[0].1 == pair[1].1 && pair[0].0 < pair[1].0);
                assert!(in_order, "{what}: {pair:?}");
            }
            for (sid, items) in items {
                assert_eq!(
                    allowed.remove(&sid),
                    Some(items),
                    "{what}: all allowed items of {sid:?}"
                );
            }
        }
    });
}

#[test]
fn a_wide_enough_beam_equals_scoring_every_sid_alone() {
    let mut compared = 0;
    for_each_model(|seed, tiny, engine, requests, answers| {
        for (request, answer) in requests.iter().zip(answers) {
            let allowed = allowed(&tiny.catalog, request);
            // Over the legal children a semantic ID that is alone has probability one.
            let is_alone_the_same = request.normalization != Some(Normalization::Children);
            if request.beams < allowed.len() || !is_alone_the_same {
                continue;
            }
            for found in &answer.items {
                let mut alone = request.clone();
                alone.beams = 1;
                let others = (0..tiny.catalog.num_items() as u32)
                    .filter(|item| !allowed[&found.sid].contains(item));
                alone.exclude = others.map(|item| tiny.catalog.name(item).to_string()).collect();
                let alone = engine.recommend(&alone).expect("a sound request");
                assert_eq!(alone.items[0].sid, found.sid, "seed {seed} {request:?}");
                assert_eq!(alone.items[0].score, found.score, "seed {seed} {request:?}");
                compared += 1;
            }
        }
    });
    assert!(compared > 10_000, "only {compared} semantic IDs were scored alone");
}

#[test]
fn an_answer_is_the_same_alone_in_any_crowd_and_on_any_number_of_threads() {
    for_each_model(|seed, tiny, engine, requests, answers| {
        for threads in [1, 2, 3] {
            let many = tiny.open(threads);
            let crowd = Mutex::new(vec![None; requests.len()]);
            let crowded = if threads == 1 { engine } else { &many };
            crowded.recommend_all(requests, |index, answer| {
                let answer = answer.expect("a sound request");
                let before = crowd.lock().expect("no holder panics")[index].replace(answer);
                assert!(before.is_none(), "seed {seed}: request {index} was answered twice");
            });
            let crowd = crowd.into_inner().expect("no holder panics");
            for (index, answer) in answers.iter().enumerate() {
                let what = format!("seed {seed}, request {index}, {threads} threads");
                assert_eq!(crowd[index].as_ref(), Some(answer), "{what}");
                if index % 8 == 0 {
                    let alone = many.recommend(&requests[index]).expect("a sound request");
                    assert_eq!(alone, *answer, "{what}, alone");
                }
            }
        }
    });
}

#[test]
fn unconstrained_searches_return_allowed_items_with_the_same_scores() {
    let mut found_some = false;
    for_each_model(|seed, tiny, engine, requests, _| {
        for request in requests.iter().step_by(4) {
            let allowed = allowed(&tiny.catalog, request);
            for constraint in [Constraint::Level, Constraint::None] {
                let mut free = request.clone();
                free.normalization = Some(Normalization::Vocabulary);
                let mut bound = free.clone();
                bound.beams = allowed.len().max(1);
                free.constraint = constraint;
                free.beams = 200;
                let scores: BTreeMap<u32, f32> = engine
                    .recommend(&bound)
                    .expect("a sound request")
                    .items
                    .iter()
                    .map(|found| (found.item, found.score))
                    .collect();
                for found in engine.recommend(&free).expect("a sound request").items {
                    let bound = scores.get(&found.item);
                    assert_eq!(bound, Some(&found.score), "seed {seed} {free:?}");
                    found_some = true;
                }
            }
        }
    });
    assert!(found_some);
}

#[test]
fn top_k_counts_items_and_the_first_of_a_shared_sid_can_stand_for_it() {
    for_each_model(|seed, tiny, engine, requests, answers| {
        let (request, whole) = (&requests[0], &answers[0]);
        let mut cut = request.clone();
        cut.top_k = 1 + seed as usize % 5;
        let answer = engine.recommend(&cut).expect("a sound request");
        let kept = cut.top_k.min(whole.items.len());
        assert_eq!(answer.items, whole.items[..kept], "seed {seed}");

        let mut first = request.clone();
        first.shared_sid = SharedSid::First;
        let answer = engine.recommend(&first).expect("a sound request");
        let allowed = allowed(&tiny.catalog, request);
        assert!(answer.items.iter().all(|found| allowed[&found.sid][0] == found.item));
        assert_eq!(answer.items.len(), request.beams.min(allowed.len()), "seed {seed}");
    });
}

#[test]
fn a_history_and_its_tokens_are_one_input() {
    // The tokens of a history are known where the prompt adds none; there both must agree.
    for seed in 0..200 {
        let tiny = Tiny::new(seed);
        let engine = tiny.open(1);
        let name = tiny.catalog.name(0).to_string();
        let by_name = engine.recommend(&Request::from_history([name.clone(), name]));
        let by_name = by_name.expect("a sound request");
        let tokens = engine.input_tokens(&Input::History(vec![tiny.catalog.name(0).into(); 2]));
        let tokens = tokens.expect("known items");
        let by_tokens = engine.recommend(&Request::from_tokens(tokens)).expect("a sound request");
        assert_eq!(by_name, by_tokens, "seed {seed}");
    }
}

#[test]
fn withdrawn_items_are_gone_and_may_still_stand_in_histories() {
    for seed in 0..200 {
        let mut tiny = Tiny::new(seed);
        let catalog = std::sync::Arc::get_mut(&mut tiny.catalog).expect("nobody else holds it");
        let gone: Vec<u32> = (0..catalog.num_items() as u32).filter(|item| item % 3 == 0).collect();
        catalog.withdraw(&gone);
        let mut request = Request::from_history([tiny.catalog.name(0)]);
        (request.beams, request.top_k) = (64, usize::MAX);
        let answer = tiny.open(1).recommend(&request).expect("a sound request");
        let mut found: Vec<u32> = answer.items.iter().map(|found| found.item).collect();
        found.sort_unstable();
        let stay = (0..tiny.catalog.num_items() as u32).filter(|item| item % 3 != 0);
        assert_eq!(found, stay.collect::<Vec<u32>>(), "seed {seed}");
        assert_eq!(answer.snapshot, 2);
    }
}
