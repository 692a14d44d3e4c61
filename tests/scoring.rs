//! Scores of given items, log-probabilities, samples, and weights that are replaced.

mod common;

use std::collections::HashMap;
use std::path::Path;
use std::sync::{Arc, mpsc};

use common::tiny::Tiny;
use sidereal::backend::LogProb;
use sidereal::catalog::Catalog;
use sidereal::{Answer, Engine, EngineOptions, Error, Normalization, Request, Tensor};

const NORMALIZATIONS: [Normalization; 3] =
    [Normalization::Vocabulary, Normalization::Level, Normalization::Children];

fn tokens(rng: &mut fastrand::Rng, tiny: &Tiny) -> Vec<u32> {
    (0..rng.usize(1..100)).map(|_| rng.u32(0..tiny.num_tokens())).collect()
}

/// A search so wide that it finds everything.
fn everything(tokens: &[u32], normalization: Normalization) -> Request {
    let mut request = Request::from_tokens(tokens);
    request.beams = 600;
    request.top_k = 1000;
    request.normalization = Some(normalization);
    request
}

#[test]
fn candidates_have_the_scores_that_a_search_gives_them() {
    let mut ranked = 0;
    for seed in 0..200 {
        let tiny = Tiny::new(seed);
        let mut rng = fastrand::Rng::with_seed(seed);
        let mut engine = tiny.open(1);
        let tokens = tokens(&mut rng, &tiny);
        for normalization in NORMALIZATIONS {
            let all = everything(&tokens, normalization);
            let found = engine.recommend(&all).expect("a sound request");
            let scores: HashMap<&str, f32> =
                found.items.iter().map(|item| (&*item.item, item.score)).collect();
            let snapshot = tiny.snapshot();
            let names: Vec<String> = snapshot
                .all_items()
                .filter(|_| rng.bool())
                .map(|item| snapshot.name(item).to_string())
                .collect();
            if names.is_empty() {
                continue;
            }
            let rank = all.with_candidates(names.clone()).with_beams(1).with_top_k(1);
            let answer = engine.recommend(&rank).expect("a sound request");
            let available = names.iter().filter(|name| scores.contains_key(name.as_str()));
            assert_eq!(answer.items.len(), available.count(), "seed {seed}");
            assert!(answer.items.is_sorted_by(|a, b| a.score >= b.score), "seed {seed}");
            for item in &answer.items {
                assert!(names.contains(&item.item));
                assert_eq!(item.score, scores[&*item.item], "seed {seed} {normalization:?}");
                ranked += 1;
            }
        }
    }
    assert!(ranked > 2000, "only {ranked} were ranked");
}

#[test]
fn candidates_do_not_go_with_what_belongs_to_a_search() {
    let tiny = Tiny::new(1);
    let mut engine = tiny.open(1);
    let mut code = |change: &dyn Fn(&mut Request)| {
        let mut request = Request::from_tokens([1]);
        request.candidates = vec!["0".into()];
        change(&mut request);
        engine.recommend(&request).err().map(|error| error.code())
    };
    assert_eq!(code(&|_| {}), None);
    assert_eq!(code(&|request| request.filter = Some("tag:a".into())), Some("invalid_field"));
    assert_eq!(code(&|request| request.exclude = vec!["0".into()]), Some("invalid_field"));
    assert_eq!(code(&|request| request.seed = Some(1)), Some("invalid_field"));
    assert_eq!(code(&|request| request.candidates.push("nobody".into())), Some("unknown_item"));
    assert_eq!(
        code(&|request| request.candidates = vec!["0".into(); 5000]),
        Some("limit_exceeded")
    );
}

fn sum(log_probs: &[LogProb], of: impl Fn(&LogProb) -> f32) -> f32 {
    log_probs.iter().map(of).sum()
}

#[test]
fn log_probabilities_add_up_to_the_scores_of_either_kind() {
    let mut compared = 0;
    for seed in 0..150 {
        let tiny = Tiny::new(seed);
        let mut rng = fastrand::Rng::with_seed(seed);
        let mut engine = tiny.open(1);
        let tokens = tokens(&mut rng, &tiny);
        let mut scores = |normalization: Normalization| -> HashMap<String, f32> {
            let request = everything(&tokens, normalization);
            let answer = engine.recommend(&request).expect("a sound request");
            answer.items.into_iter().map(|item| (item.item, item.score)).collect()
        };
        let vocabulary = scores(Normalization::Vocabulary);
        let children = scores(Normalization::Children);
        let asked = NORMALIZATIONS[rng.usize(0..3)];
        let request = everything(&tokens, asked).with_log_probs(true);
        let answer = engine.recommend(&request).expect("a sound request");
        let plain = engine.recommend(&everything(&tokens, asked)).expect("a sound request");
        assert_eq!(answer.items.len(), plain.items.len());
        for (item, plain) in answer.items.iter().zip(&plain.items) {
            assert_eq!((&item.item, item.score), (&plain.item, plain.score), "seed {seed}");
            assert!(plain.log_probs.is_empty());
            let name = &*item.item;
            let close = |found: f32, expected: f32| {
                assert!((found - expected).abs() < 1e-4, "seed {seed}: {found}, not {expected}");
            };
            close(sum(&item.log_probs, |token| token.vocabulary), vocabulary[name]);
            // A forced token counts under the vocabulary alone.
            close(sum(&item.log_probs, |token| token.children), children[name]);
            compared += 1;
        }
    }
    assert!(compared > 1000, "only {compared} were compared");
}

/// By item of the draws' first place, and by pairs of the first two: how often.
fn draws(engine: &mut Engine, request: &Request, count: u64) -> HashMap<Vec<u32>, usize> {
    let mut seen = HashMap::new();
    let requests: Vec<Request> = (0..count).map(|seed| request.clone().with_seed(seed)).collect();
    engine.recommend_all(&requests, |_, answer| {
        let answer = answer.expect("a sound request");
        let mut sids: Vec<u32> = Vec::new();
        for item in &answer.items {
            let sid = item.sid.codes().iter().fold(0, |sid, &code| sid * 100 + u32::from(code));
            if !sids.contains(&sid) {
                sids.push(sid);
            }
        }
        *seen.entry(sids).or_insert(0) += 1;
    });
    seen
}

#[test]
fn samples_are_drawn_without_replacement_with_the_models_probabilities() {
    let mut tested = 0;
    for seed in 0..30 {
        let tiny = Tiny::new(seed);
        let mut engine = tiny.open(2);
        let tokens: Vec<u32> = vec![1, 2, 3];
        let all = everything(&tokens, Normalization::Children);
        let answer = engine.recommend(&all).expect("a sound request");
        let mut probabilities: HashMap<u32, f64> = HashMap::new();
        for item in &answer.items {
            let sid = item.sid.codes().iter().fold(0, |sid, &code| sid * 100 + u32::from(code));
            probabilities.insert(sid, f64::from(item.score).exp());
        }
        if probabilities.len() < 3 {
            continue;
        }
        let total: f64 = probabilities.values().sum();
        assert!((total - 1.0).abs() < 1e-4, "seed {seed}: {total} in all");
        let count = 4000;
        let request = all.with_beams(2);
        let seen = draws(&mut engine, &request, count);
        assert!(seen.keys().all(|pair| pair.len() == 2 && pair[0] != pair[1]), "seed {seed}");
        // Chi-square over ordered pairs: the second is drawn from what the first left.
        let (mut statistic, mut cells, mut rest, mut rest_expected) = (0.0, 0.0, 0.0, 0.0);
        for (a, pa) in &probabilities {
            for (b, pb) in probabilities.iter().filter(|(b, _)| *b != a) {
                let expected = count as f64 * pa * pb / (1.0 - pa);
                let found = seen.get(&vec![*a, *b]).copied().unwrap_or(0) as f64;
                if expected < 5.0 {
                    (rest, rest_expected) = (rest + found, rest_expected + expected);
                    continue;
                }
                statistic += (found - expected) * (found - expected) / expected;
                cells += 1.0;
            }
        }
        if rest_expected >= 5.0 {
            statistic += (rest - rest_expected) * (rest - rest_expected) / rest_expected;
            cells += 1.0;
        }
        // Five standard deviations of its distribution.
        let bound = cells + 5.0 * (2.0f64 * cells).sqrt();
        assert!(statistic < bound, "seed {seed}: {statistic:.0} over {cells} cells");
        tested += 1;
    }
    assert!(tested >= 15, "only {tested} models were tested");
}

#[test]
fn a_sample_is_the_same_for_the_same_seed_in_any_company_with_the_scores_of_a_search() {
    for seed in 0..60 {
        let tiny = Tiny::new(seed);
        let mut rng = fastrand::Rng::with_seed(seed);
        let mut engine = tiny.open(2);
        let tokens = tokens(&mut rng, &tiny);
        let normalization = NORMALIZATIONS[rng.usize(0..3)];
        let all = everything(&tokens, normalization);
        let found = engine.recommend(&all).expect("a sound request");
        let scores: HashMap<&str, f32> =
            found.items.iter().map(|item| (&*item.item, item.score)).collect();
        let requests: Vec<Request> = (0..20)
            .map(|n| all.clone().with_seed(n / 2).with_beams(3).with_log_probs(n % 4 < 2))
            .collect();
        let mut answers: Vec<Option<Answer>> = vec![None; requests.len()];
        engine.recommend_all(&requests, |index, answer| answers[index] = answer.ok());
        let answers: Vec<Answer> = answers.into_iter().flatten().collect();
        assert_eq!(answers.len(), requests.len());
        for (pair, request) in answers.chunks(2).zip(requests.iter().step_by(2)) {
            assert_eq!(pair[0], pair[1], "seed {seed}");
            assert_eq!(pair[0], engine.recommend(request).expect("alone"), "seed {seed}");
            for item in &pair[0].items {
                let expected = scores[&*item.item];
                assert!((item.score - expected).abs() < 1e-4, "seed {seed}: {expected}");
            }
        }
    }
}

fn golden(family: &str) -> (Engine, Vec<Request>) {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("models").join(family);
    let golden = std::fs::read_to_string(folder.join("golden.json")).expect("golden answers");
    let golden: serde_json::Value = serde_json::from_str(&golden).expect("golden answers");
    let items = golden["items_index"].as_str().expect("a path");
    let catalog = Catalog::open(&folder.join(items)).expect("a catalogue");
    let options = EngineOptions::default().with_threads(1);
    let engine = Engine::open(&folder, Arc::new(catalog), &options).expect("a model");
    let request = |first: u32| Request::from_tokens((first..first + 80).collect::<Vec<u32>>());
    (engine, (1..5).map(request).collect())
}

#[test]
fn replaced_weights_answer_from_then_on_and_cached_contexts_are_gone() {
    for (family, name) in [
        ("decoder_only/qwen3-tied", "model.layers.0.mlp.down_proj.weight"),
        ("t5/relu-tied", "encoder.block.0.layer.0.SelfAttention.q.weight"),
    ] {
        let (mut engine, requests) = golden(family);
        let (mut other, _) = golden(family);
        let ask = |engine: &mut Engine| -> Vec<Answer> {
            requests.iter().map(|request| engine.recommend(request).expect("sound")).collect()
        };
        let before = ask(&mut engine);
        assert!(before.iter().all(|answer| answer.weights_version == 1));
        assert!(ask(&mut engine)[0].cached_tokens > 0, "{family} keeps contexts");
        let weights = sidereal::models::weights::Weights::open(
            &Path::new(env!("CARGO_MANIFEST_DIR")).join("models").join(family),
        )
        .expect("a checkpoint");
        let shapes: HashMap<String, Vec<usize>> = weights.shapes().into_iter().collect();
        let shape = &shapes[name];
        let values: Vec<f32> =
            (0..shape.iter().product()).map(|n| (n as f32).sin() / 9.0).collect();

        let wrong = engine.replace_weights([(name.to_string(), Tensor::new(&[1], vec![1.0]))]);
        assert_eq!(wrong.expect_err("another shape").code(), "tensor_shape");
        let wrong = engine.replace_weights([("no such".to_string(), Tensor::new(&[1], vec![1.0]))]);
        assert_eq!(wrong.expect_err("another name").code(), "unexpected_tensor");
        let mut broken = values.clone();
        broken[3] = f32::NAN;
        let wrong = engine.replace_weights([(name.to_string(), Tensor::new(shape, broken))]);
        assert_eq!(wrong.expect_err("not a number").code(), "non_finite_weight");
        assert_eq!(ask(&mut engine), before, "nothing was replaced");

        // One that runs is finished with the weights that it began with.
        let (sender, answers) = mpsc::channel();
        let reply = move |answer| sender.send(answer).expect("a receiver");
        engine.submit(requests[0].clone(), reply).expect("a sound request");
        engine.step().expect("it goes on");
        assert!(answers.try_recv().is_err(), "it takes several steps");
        let version =
            engine.replace_weights([(name.to_string(), Tensor::new(shape, values.clone()))]);
        assert_eq!(version.expect("the same shape"), 2);
        let answer = answers.try_recv().expect("it is finished").expect("a sound request");
        assert_eq!(answer, before[0]);
        assert_eq!(answer.weights_version, 1);

        let first = engine.recommend(&requests[0]).expect("a sound request");
        assert_eq!((first.cached_tokens, first.weights_version), (0, 2));
        let after = ask(&mut engine);
        assert_ne!(after, before, "{family} answers as before");
        // As if the checkpoint had always been so, and back again.
        other.replace_weights([(name.to_string(), Tensor::new(shape, values))]).expect("sound");
        assert_eq!(ask(&mut other), after);
    }
}

#[test]
fn finite_weights_that_give_no_score_are_refused_and_the_old_ones_stay() {
    for (family, name) in [
        ("decoder_only/qwen3-tied", "model.norm.weight"),
        ("t5/relu-tied", "decoder.final_layer_norm.weight"),
    ] {
        let (mut engine, requests) = golden(family);
        let ask = |engine: &mut Engine| -> Vec<Answer> {
            requests.iter().map(|request| engine.recommend(request).expect("sound")).collect()
        };
        let before = ask(&mut engine);
        let answered = engine.metrics().answered;
        let weights = sidereal::models::weights::Weights::open(
            &Path::new(env!("CARGO_MANIFEST_DIR")).join("models").join(family),
        );
        let shapes = weights.expect("a checkpoint").shapes();
        let (_, shape) = shapes.iter().find(|(own, _)| own == name).expect("its norm");
        let norm = |value: f32| {
            let values = vec![value; shape[0]];
            [(name.to_string(), Tensor::new(shape, values))]
        };
        // Of two requests that are there already, one runs and one waits.
        let (sender, answers) = mpsc::channel();
        let submit = |engine: &mut Engine| {
            let sender = sender.clone();
            let reply = move |answer| sender.send(answer).expect("a receiver");
            engine.submit(requests[0].clone(), reply).expect("a sound request");
        };
        submit(&mut engine);
        engine.step().expect("it goes on");
        submit(&mut engine);
        let refused = engine.replace_weights(norm(f32::MAX)).expect_err("no score");
        assert_eq!(refused.code(), "non_finite_model", "{refused}");
        while !engine.is_idle() {
            engine.step().expect("it goes on");
        }
        let answers: Vec<Answer> = answers.try_iter().map(|it| it.expect("sound")).collect();
        assert_eq!(answers, [before[0].clone(), before[0].clone()], "{family}");
        assert_eq!((ask(&mut engine), engine.weights_version()), (before.clone(), 1), "{family}");
        engine.check_integrity().expect("all pages");
        // What the engine asks for itself is nobody's request.
        assert_eq!(engine.metrics().answered, answered + 2 + requests.len() as u64);
        assert_eq!(engine.replace_weights(norm(0.5)).expect("sound weights"), 2);
        assert_ne!(ask(&mut engine), before, "{family} answers as before");
    }
}

#[test]
fn tensors_that_panic_on_their_way_leave_the_weights_as_they_were() {
    let (mut engine, requests) = golden("decoder_only/qwen3-tied");
    let before = engine.recommend(&requests[0]).expect("sound");
    let tensors = std::iter::from_fn(|| -> Option<(String, Tensor)> {
        std::panic::resume_unwind(Box::new("on purpose"))
    });
    let replace = std::panic::AssertUnwindSafe(|| engine.replace_weights(tensors));
    assert!(std::panic::catch_unwind(replace).is_err());
    assert_eq!(engine.recommend(&requests[0]).expect("sound"), before);
    assert_eq!(engine.replace_weights([]).expect("nothing to do"), 2);
}

#[test]
fn random_weights_cannot_be_replaced() {
    let error = Tiny::new(2).open(1).replace_weights([]).expect_err("there is no checkpoint");
    assert!(matches!(error, Error::Unsupported { .. }), "{error}");
}
