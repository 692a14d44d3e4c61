//! What must hold of every answer, on thousands of random requests to random small models.

mod common;

use std::cmp::Reverse;
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

use common::tiny::Tiny;
use sidereal::backend::cpu::{CpuBackend, Instructions};
use sidereal::catalog::sid::Sid;
use sidereal::catalog::{Change, Snapshot};
use sidereal::{
    Answer, CatalogWriter, Constraint, Dtype, Engine, EngineOptions, Input, Normalization, Request,
    SharedSid, WriterOptions,
};

const MODELS: u64 = 260;
const REQUESTS_PER_MODEL: usize = 40; // 10,400 cases

/// Filters with what they mean, written down apart.
type Passes = fn(&[String]) -> bool;
const FILTERS: [(&str, Passes); 5] = [
    ("tag:a", |tags| has(tags, "a")),
    ("!tag:a | tag:b", |tags| !has(tags, "a") || has(tags, "b")),
    ("(tag:a or tag:c) and not (tag:b & tag:c)", |tags| {
        (has(tags, "a") || has(tags, "c")) && !(has(tags, "b") && has(tags, "c"))
    }),
    ("tag:nobody", |_| false),
    ("all", |_| true),
];

fn has(tags: &[String], tag: &str) -> bool {
    tags.iter().any(|other| other == tag)
}

fn passes(filter: &str, tags: &[String]) -> bool {
    let known = FILTERS.iter().find(|(text, _)| *text == filter);
    known.expect("one of those above").1(tags)
}

fn random_request(rng: &mut fastrand::Rng, snapshot: &Snapshot) -> Request {
    let items: Vec<u32> = snapshot.all_items().collect();
    let mut name = || snapshot.name(items[rng.usize(0..items.len())]).to_string();
    let history: Vec<String> = (0..8).map(|_| name()).collect();
    let history = history[..rng.usize(1..=8)].to_vec();
    let mut request = Request::from_history(history);
    let share = rng.f32() * rng.f32();
    let excluded = items.iter().filter(|_| rng.f32() < share);
    request.exclude = excluded.map(|&item| snapshot.name(item).to_string()).collect();
    if rng.u8(0..4) == 0 {
        let share = rng.f32();
        let listed = items.iter().filter(|_| rng.f32() < share);
        request.only = Some(listed.map(|&item| snapshot.name(item).to_string()).collect());
    }
    if rng.u8(0..3) == 0 {
        request.filter = Some(FILTERS[rng.usize(0..FILTERS.len())].0.into());
    }
    request.beams = if rng.bool() { rng.usize(1..8) } else { 64 };
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

/// The items that a request allows, by semantic ID; those of one by weight, then by name.
fn allowed(snapshot: &Snapshot, request: &Request) -> BTreeMap<Sid, Vec<u32>> {
    let mut allowed: BTreeMap<Sid, Vec<u32>> = BTreeMap::new();
    for item in snapshot.all_items() {
        let filter = request.filter.as_deref();
        if snapshot.is_available(item)
            && !request.exclude.iter().any(|name| name == snapshot.name(item))
            && request
                .only
                .as_ref()
                .is_none_or(|only| only.iter().any(|name| name == snapshot.name(item)))
            && filter.is_none_or(|filter| passes(filter, &snapshot.tags(item)))
        {
            allowed.entry(snapshot.sid(item)).or_default().push(item);
        }
    }
    for items in allowed.values_mut() {
        items.sort_by_key(|&item| (Reverse(snapshot.weight(item)), snapshot.name(item)));
    }
    allowed
}

fn for_each_model(mut check: impl FnMut(u64, &Tiny, &mut Engine, &[Request], &[Answer])) {
    for seed in 0..MODELS {
        let tiny = Tiny::new(seed);
        let mut rng = fastrand::Rng::with_seed(seed ^ 0xbea);
        let mut engine = tiny.open(1);
        let requests: Vec<Request> =
            (0..REQUESTS_PER_MODEL).map(|_| random_request(&mut rng, &tiny.snapshot())).collect();
        let answer = |request| engine.recommend(request).expect("a sound request");
        let answers: Vec<Answer> = requests.iter().map(answer).collect();
        check(seed, &tiny, &mut engine, &requests, &answers);
    }
}

#[test]
fn answers_are_legal_complete_and_in_order() {
    for_each_model(|seed, tiny, _, requests, answers| {
        for (request, answer) in requests.iter().zip(answers) {
            let what = format!("seed {seed} {request:?}");
            let mut allowed = allowed(&tiny.snapshot(), request);
            let expected = request.beams.min(allowed.len());
            let mut sids: Vec<(Sid, f32)> = Vec::new();
            let mut items: BTreeMap<Sid, Vec<u32>> = BTreeMap::new();
            for found in &answer.items {
                let item = answer.snapshot.find(&found.item).expect("an item of the snapshot");
                assert_eq!(found.sid, answer.snapshot.sid(item), "{what}");
                if sids.last().is_none_or(|(sid, _)| *sid != found.sid) {
                    sids.push((found.sid, found.score));
                }
                items.entry(found.sid).or_default().push(item);
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
            let allowed = allowed(&tiny.snapshot(), request);
            // Over the legal children a semantic ID that is alone has probability one.
            let is_alone_the_same = request.normalization != Some(Normalization::Children);
            if request.beams < allowed.len() || !is_alone_the_same {
                continue;
            }
            for found in &answer.items {
                let mut alone = request.clone();
                alone.beams = 1;
                let snapshot = tiny.snapshot();
                let others = snapshot.all_items();
                let others = others.filter(|item| !allowed[&found.sid].contains(item));
                alone.exclude = others.map(|item| snapshot.name(item).to_string()).collect();
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
            let mut many = tiny.open(threads);
            let crowd = Mutex::new(vec![None; requests.len()]);
            let crowded = if threads == 1 { &mut *engine } else { &mut many };
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

/// Every set of instructions sums in an order of its own, which is the same in any company.
#[test]
fn an_answer_in_bf16_and_int8_is_the_same_alone_in_any_crowd_and_on_any_number_of_threads() {
    let sets = [
        (Dtype::Bf16, Instructions::Amx),
        (Dtype::Bf16, Instructions::Avx512Bf16),
        (Dtype::Bf16, Instructions::Widened),
        (Dtype::Int8, Instructions::Amx),
        (Dtype::Int8, Instructions::Avx512Vnni),
        (Dtype::Int8, Instructions::Widened),
    ];
    for (dtype, instructions) in sets.into_iter().filter(|(_, set)| set.is_available()) {
        for seed in 0..8 {
            let tiny = Tiny::new(seed);
            let open = |threads| {
                let backend = CpuBackend::with_instructions(dtype, instructions);
                let options = EngineOptions::default().with_threads(threads);
                tiny.open_on(backend, Arc::clone(&tiny.catalog), &options)
            };
            let mut rng = fastrand::Rng::with_seed(seed);
            let requests = std::iter::repeat_with(|| random_request(&mut rng, &tiny.snapshot()));
            let requests: Vec<Request> = requests.take(30).collect();
            let mut alone = open(1);
            for threads in [1, 3] {
                open(threads).recommend_all(&requests, |index, answer| {
                    let expected = alone.recommend(&requests[index]);
                    let what = format!("{dtype:?} {instructions}, seed {seed}, request {index}");
                    assert_eq!(answer.expect("sound"), expected.expect("sound"), "{what}");
                });
            }
        }
    }
}

#[test]
fn unconstrained_searches_return_allowed_items_with_the_same_scores() {
    let mut found_some = false;
    for_each_model(|seed, tiny, engine, requests, _| {
        for request in requests.iter().step_by(4) {
            let allowed = allowed(&tiny.snapshot(), request);
            for constraint in [Constraint::Occurring, Constraint::Level, Constraint::None] {
                let mut free = request.clone();
                free.normalization = Some(Normalization::Vocabulary);
                let mut bound = free.clone();
                bound.beams = allowed.len().max(1);
                free.constraint = constraint;
                free.beams = 200;
                let scores: BTreeMap<String, f32> = engine
                    .recommend(&bound)
                    .expect("a sound request")
                    .items
                    .into_iter()
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
        let allowed = allowed(&tiny.snapshot(), request);
        let name = |sid: &Sid| tiny.snapshot().name(allowed[sid][0]).to_string();
        assert!(answer.items.iter().all(|found| name(&found.sid) == found.item));
        assert_eq!(answer.items.len(), request.beams.min(allowed.len()), "seed {seed}");
    });
}

#[test]
fn a_history_and_its_tokens_are_one_input() {
    // The tokens of a history are known where the prompt adds none; there both must agree.
    for seed in 0..200 {
        let tiny = Tiny::new(seed);
        let mut engine = tiny.open(1);
        let name = "0".to_string();
        let by_name = engine.recommend(&Request::from_history([name.clone(), name]));
        let by_name = by_name.expect("a sound request");
        let tokens = engine.input_tokens(&Input::History(vec!["0".into(); 2]));
        let tokens = tokens.expect("known items");
        let by_tokens = engine.recommend(&Request::from_tokens(tokens)).expect("a sound request");
        assert_eq!(by_name, by_tokens, "seed {seed}");
    }
}

#[test]
fn withdrawn_items_are_gone_and_may_still_stand_in_histories() {
    for seed in 0..200 {
        let tiny = Tiny::new(seed);
        let before = tiny.snapshot();
        let gone: Vec<String> =
            before.all_items().map(|item| before.name(item).to_string()).step_by(3).collect();
        let options = WriterOptions::default();
        let writer = CatalogWriter::in_memory(tiny.catalog.clone(), &options).expect("a thread");
        let withdraw =
            |item: &String| Change::Availability { item: item.clone(), available: false };
        let number = writer.apply(&gone.iter().map(withdraw).collect::<Vec<_>>()).expect("sound");
        let mut request = Request::from_history([gone[0].clone()]);
        (request.beams, request.top_k) = (64, usize::MAX);
        let answer = tiny.open(1).recommend(&request).expect("a sound request");
        let mut found: Vec<&str> = answer.items.iter().map(|found| &*found.item).collect();
        found.sort_unstable();
        let stays = |&item: &u32| {
            before.is_available(item) && gone.iter().all(|name| name != before.name(item))
        };
        let stay = before.all_items().filter(stays);
        let mut stay: Vec<&str> = stay.map(|item| before.name(item)).collect();
        stay.sort_unstable();
        assert_eq!(found, stay, "seed {seed}");
        assert_eq!(answer.snapshot.number(), number);
    }
}

#[test]
fn each_group_is_answered_as_a_request_of_its_own() {
    for_each_model(|seed, tiny, engine, requests, _| {
        let mut rng = fastrand::Rng::with_seed(seed);
        let snapshot = tiny.snapshot();
        let mut grouped: Vec<Request> = requests.iter().step_by(8).cloned().collect();
        let mut expected = Vec::new();
        for request in &mut grouped {
            let count = rng.usize(1..4);
            let each: Vec<&str> = (0..count).map(|_| FILTERS[rng.usize(0..5)].0).collect();
            request.top_k = rng.usize(1..9);
            let mut alone = |each: &&str| {
                let mut alone = request.clone();
                alone.filter = Some(match &request.filter {
                    Some(filter) => format!("({filter}) & ({each})"),
                    None => each.to_string(),
                });
                engine.recommend(&alone).expect("a sound request").items
            };
            expected.push(each.iter().map(&mut alone).collect::<Vec<_>>());
            request.groups = each.iter().map(|each| each.to_string()).collect();
        }
        // Among requests without groups, in one wave.
        let mut crowd = requests[..4].to_vec();
        crowd.extend(grouped);
        let answers = Mutex::new(vec![None; crowd.len()]);
        engine.recommend_all(&crowd, |index, answer| {
            answers.lock().expect("no holder panics")[index] = Some(answer.expect("sound"));
        });
        let answers = answers.into_inner().expect("no holder panics");
        for (answer, expected) in answers[4..].iter().zip(expected) {
            let answer = answer.as_ref().expect("answered");
            let groups: Vec<_> = answer.groups.iter().map(|group| group.items.clone()).collect();
            assert_eq!(groups, expected, "seed {seed}");
            assert_eq!(answer.snapshot.number(), snapshot.number());
            assert!(answer.items.is_empty());
        }
    });
}
