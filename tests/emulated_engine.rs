//! Whole engines on the emulator: their answers are the CPU's.
//!
//! Without g++ on x86-64 Linux these tests are ignored.

mod common;

use std::collections::HashMap;
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use common::emulator::Emulator;
use common::kernels::{Build, Kernels};
use common::tiny::{Tiny, random_change, random_request};
use sidereal::backend::cuda::CudaBackend;
use sidereal::catalog::{Catalog, Change};
use sidereal::models::config::{Config, SidLayout};
use sidereal::models::weights::Weights;
use sidereal::{
    Answer, CatalogWriter, Constraint, Dtype, Engine, EngineOptions, Error, Forced, NamedToken,
    Recommendation, Recommender, RecommenderOptions, Request, Result, Tensor, Think, WriterOptions,
};

/// Little memory: the emulator's is that of the machine.
fn options() -> EngineOptions {
    EngineOptions::default()
        .with_threads(1)
        .with_max_context(300)
        .with_context_tokens(4096)
        .with_max_beam_rows(1024)
        .with_rows_per_step(64)
}

/// All answers, by the order of the requests.
fn answers<B: sidereal::backend::Backend>(
    engine: &mut Engine<B>,
    requests: &[Request],
) -> Vec<Result<Answer>> {
    let mut answers: Vec<Option<Result<Answer>>> = requests.iter().map(|_| None).collect();
    engine.recommend_all(requests, |index, answer| answers[index] = Some(answer));
    answers.into_iter().map(|answer| answer.expect("all are answered")).collect()
}

/// Lists are the same but for items whose scores are within the tolerance of each other.
fn assert_alike(cpu: &[Recommendation], found: &[Recommendation], tolerance: f32, what: &str) {
    assert_eq!(cpu.len(), found.len(), "{what}: number of items");
    let on_cpu: HashMap<&str, &Recommendation> =
        cpu.iter().map(|item| (&*item.item, item)).collect();
    for (rank, (expected, item)) in cpu.iter().zip(found).enumerate() {
        let difference = (expected.score - item.score).abs();
        assert!(difference < tolerance, "{what}: rank {rank}: {item:?}, not {expected:?}");
        match on_cpu.get(&*item.item) {
            Some(expected) => {
                let difference = (expected.score - item.score).abs();
                assert!(difference < tolerance, "{what}: {item:?} is {expected:?} on the CPU");
                assert_eq!(expected.log_probs.len(), item.log_probs.len(), "{what}");
                for (a, b) in expected.log_probs.iter().zip(&item.log_probs) {
                    let alike = (a.vocabulary - b.vocabulary).abs() < tolerance
                        && (a.children - b.children).abs() < tolerance;
                    assert!(alike, "{what}: {item:?} is {expected:?} on the CPU");
                }
            }
            // Only what is as good as the last of the list may have taken its place.
            None => {
                let last = cpu[cpu.len() - 1].score;
                assert!((item.score - last).abs() < tolerance, "{what}: {item:?} is not there");
            }
        }
    }
}

fn assert_all_alike(
    requests: &[Request],
    cpu: &[Result<Answer>],
    found: &[Result<Answer>],
    tolerance: f32,
    what: &str,
) {
    for (index, ((cpu, found), request)) in cpu.iter().zip(found).zip(requests).enumerate() {
        let what = format!("{what} request {index} {request:?}");
        match (cpu, found) {
            (Ok(cpu), Ok(found)) => {
                assert_alike(&cpu.items, &found.items, tolerance, &what);
                assert_eq!(cpu.groups.len(), found.groups.len(), "{what}");
                assert_eq!(cpu.read.len(), found.read.len(), "{what}");
                for (cpu, found) in cpu.read.iter().zip(&found.read) {
                    assert_eq!((cpu.token, &cpu.text), (found.token, &found.text), "{what}");
                    let difference = (cpu.log_prob - found.log_prob).abs();
                    assert!(difference < tolerance, "{what}: {found:?}, not {cpu:?}");
                }
                assert_eq!(cpu.snapshot.number(), found.snapshot.number(), "{what}");
                for (cpu, found) in cpu.groups.iter().zip(&found.groups) {
                    assert_eq!(cpu.filter, found.filter, "{what}");
                    assert_alike(&cpu.items, &found.items, tolerance, &what);
                }
            }
            (Err(cpu), Err(found)) => assert_eq!(cpu.to_string(), found.to_string(), "{what}"),
            (Ok(_), Err(error)) => panic!("{what}: {error}"),
            (Err(error), Ok(_)) => panic!("{what}: the CPU says {error}"),
        }
    }
}

/// Requests of every kind: searches, samples, log-probabilities, items to score.
fn requests(rng: &mut fastrand::Rng, tiny: &Tiny, count: usize) -> Vec<Request> {
    let mut contexts = Vec::new();
    let snapshot = tiny.snapshot();
    let kinds = (0..count).map(|_| {
        let mut request = random_request(rng, tiny, &mut contexts);
        request.filter = request.filter.filter(|_| rng.bool());
        match rng.u8(0..6) {
            0 if request.constraint == Constraint::Trie => request.seed = Some(rng.u64(..)),
            1 if request.constraint == Constraint::Trie => request.log_probs = true,
            2 => {
                let names = snapshot.all_items().map(|item| snapshot.name(item).to_string());
                let candidates: Vec<String> = names.filter(|_| rng.bool()).collect();
                request = Request::from_tokens(contexts[0].clone()).with_candidates(candidates);
                request.log_probs = rng.bool();
            }
            3 => {
                let names = snapshot.all_items().map(|item| snapshot.name(item).to_string());
                request.exclude = names.filter(|_| rng.u8(0..3) == 0).collect();
            }
            _ => {}
        }
        request
    });
    kinds.collect()
}

fn answers_of_tiny_models_are_those_of_the_cpu(build: Build, seeds: Range<u64>, count: usize) {
    let mut num_cached = 0;
    for seed in seeds {
        let tiny = Tiny::new(seed);
        let mut rng = fastrand::Rng::with_seed(seed);
        let requests = requests(&mut rng, &tiny, count);
        let catalog = || Arc::clone(&tiny.catalog);
        let mut cpu = tiny.open_as(catalog(), &options());
        let backend = Emulator::backend(build, Dtype::F32);
        let mut emulated = tiny.open_on(backend, catalog(), &options());
        let expected = answers(&mut cpu, &requests);
        let found = answers(&mut emulated, &requests);
        assert_all_alike(&requests, &expected, &found, 1e-3, &format!("seed {seed}"));
        emulated.check_integrity().expect("all pages are in one place");
        let cached = found.iter().flatten().map(|answer| answer.cached_tokens);
        num_cached += cached.sum::<usize>();
    }
    assert!(num_cached > 0, "some requests begin like earlier ones");
}

#[test]
#[cfg_attr(not(cpp_compiler), ignore = "needs g++ on x86-64 Linux")]
fn answers_of_tiny_models_are_those_of_the_cpu_checked() {
    answers_of_tiny_models_are_those_of_the_cpu(Build::Checked, 0..3, 6);
}

#[test]
#[ignore = "a sweep; run it by name"]
fn sweep_of_tiny_models_checked() {
    answers_of_tiny_models_are_those_of_the_cpu(Build::Checked, 3..30, 6);
}

#[test]
#[cfg_attr(not(cpp_compiler), ignore = "needs g++ on x86-64 Linux")]
fn answers_of_tiny_models_are_those_of_the_cpu_at_length() {
    answers_of_tiny_models_are_those_of_the_cpu(Build::Plain, 6..11, 12);
}

#[test]
#[ignore = "a sweep; run it by name"]
fn sweep_of_tiny_models_at_length() {
    answers_of_tiny_models_are_those_of_the_cpu(Build::Plain, 11..66, 12);
}

/// Tokens that are forced before the codes and tokens that are read, with searches and without.
fn programs(rng: &mut fastrand::Rng, tiny: &Tiny, count: usize) -> Vec<Request> {
    let mut programs = requests(rng, tiny, count);
    for request in &mut programs {
        let mut tokens =
            |most: usize| (0..rng.usize(1..=most)).map(|_| rng.u32(0..tiny.num_tokens())).collect();
        let (forced, read): (Vec<u32>, Vec<u32>) = (tokens(3), tokens(6));
        request.forced = match rng.u8(0..3) {
            0 => None,
            1 => Some(Forced::new(forced)),
            _ => Some(Forced::counted(forced)),
        };
        if rng.bool() {
            request.read = read.into_iter().map(NamedToken::Id).collect();
        }
        if !request.read.is_empty() && request.groups.is_empty() && request.candidates.is_empty() {
            (request.filter, request.exclude, request.only) = (None, Vec::new(), None);
            (request.seed, request.log_probs) = (None, false);
        }
    }
    programs
}

#[test]
#[cfg_attr(not(cpp_compiler), ignore = "needs g++ on x86-64 Linux")]
fn programs_of_forced_and_named_tokens_are_answered_as_on_the_cpu() {
    check_programs(0..4);
}

#[test]
#[ignore = "a sweep; run it by name"]
fn sweep_of_programs_of_forced_and_named_tokens() {
    check_programs(4..20);
}

fn check_programs(seeds: Range<u64>) {
    let (mut num_read, mut num_forced, mut num_replays) = (0, 0, 0);
    let num_seeds = seeds.clone().count();
    for seed in seeds {
        let build = if seed < 2 { Build::Checked } else { Build::Plain };
        let tiny = Tiny::new(seed);
        let mut rng = fastrand::Rng::with_seed(seed);
        let requests = programs(&mut rng, &tiny, 8);
        let catalog = || Arc::clone(&tiny.catalog);
        let mut cpu = tiny.open_as(catalog(), &options());
        let mut emulated =
            tiny.open_on(Emulator::backend(build, Dtype::F32), catalog(), &options());
        let expected = answers(&mut cpu, &requests);
        // Again with cached contexts, and steps that are replayed.
        for round in 0..2 {
            let found = answers(&mut emulated, &requests);
            let what = format!("seed {seed} round {round}");
            assert_all_alike(&requests, &expected, &found, 1e-3, &what);
        }
        emulated.check_integrity().expect("all pages are in one place");
        num_replays += emulated.run(|backend| backend.traffic().replays);
        num_read += expected.iter().flatten().filter(|answer| !answer.read.is_empty()).count();
        num_forced += requests.iter().filter(|request| request.forced.is_some()).count();
    }
    let is_enough = num_read > 2 * num_seeds && num_forced > 3 * num_seeds && num_replays > 0;
    assert!(is_enough, "{num_read} {num_forced} {num_replays}");
}

#[test]
#[cfg_attr(not(cpp_compiler), ignore = "needs g++ on x86-64 Linux")]
fn long_prompts_that_an_encoder_reads_in_pieces_are_answered_as_on_the_cpu() {
    let mut num_checked = 0;
    for seed in (0..40).filter(|&seed| Tiny::new(seed).has_encoder()).take(3) {
        let tiny = Tiny::new(seed);
        let prompt = |len: u32| (0..len).map(|at| (at * 7 + at / 3) % tiny.num_tokens());
        let requests: Vec<Request> = [3, 4, 5, 3, 4, 200, 5]
            .map(|len| Request::from_tokens(prompt(len).collect::<Vec<_>>()).with_beams(5))
            .into();
        let options = options().with_tokens_per_step(40).with_prefix_cache(false);
        let mut cpu = tiny.open_as(Arc::clone(&tiny.catalog), &options);
        let backend = Emulator::backend(Build::Plain, Dtype::F32);
        let mut emulated = tiny.open_on(backend, Arc::clone(&tiny.catalog), &options);
        let ask = |engine: &mut dyn FnMut(&Request) -> Result<Answer>| -> Vec<Result<Answer>> {
            requests.iter().map(engine).collect()
        };
        let on_cpu = ask(&mut |request| cpu.recommend(request));
        let found = ask(&mut |request| emulated.recommend(request));
        assert_all_alike(&requests, &on_cpu, &found, 2e-4, &format!("seed {seed}"));
        num_checked += 1;
    }
    assert_eq!(num_checked, 3);
}

#[test]
#[cfg_attr(not(cpp_compiler), ignore = "needs g++ on x86-64 Linux")]
fn a_program_of_more_steps_than_a_device_takes_is_refused() {
    let tiny = Tiny::new(1);
    let backend = Emulator::backend(Build::Plain, Dtype::F32);
    let mut emulated = tiny.open_on(backend, Arc::clone(&tiny.catalog), &options());
    let request = Request::from_tokens([1]).with_forced(Forced::counted([1; 40]));
    let error = emulated.recommend(&request).expect_err("too many steps");
    assert!(matches!(error, Error::Unsupported { .. }), "{error}");
    assert!(error.to_string().contains("force fewer tokens"), "{error}");
}

#[test]
#[cfg_attr(not(cpp_compiler), ignore = "needs g++ on x86-64 Linux")]
fn what_no_kernel_does_yet_is_refused() {
    let tiny = Tiny::new(1);
    let backend = || Emulator::backend(Build::Plain, Dtype::F32);
    let mut emulated = tiny.open_on(backend(), Arc::clone(&tiny.catalog), &options());
    let think = Think::new(4, [NamedToken::Id(1)]);
    let error = emulated.recommend(&Request::from_tokens([1]).with_think(think));
    let error = error.expect_err("a thought");
    assert!(matches!(error, Error::Unsupported { .. }), "{error}");
    assert!(error.to_string().contains("leave \"think\" out"), "{error}");
    let mut free = Request::from_tokens([1]).with_constraint(Constraint::Level);
    free.seed = Some(3);
    let error = emulated.recommend(&free).expect_err("a sample without the trie");
    assert!(matches!(error, Error::Unsupported { .. }), "{error}");
    assert!(error.to_string().contains("leave \"constraint\" out"), "{error}");
    let folder = tempfile::tempdir().expect("a temporary folder");
    let models = Path::new(env!("CARGO_MANIFEST_DIR")).join("models");
    for name in ["phrases/qwen3/config.json", "phrases/qwen3/model.safetensors"] {
        let to = folder.path().join(name.rsplit('/').next().expect("a name"));
        std::fs::copy(models.join(name), to).expect("a checkpoint");
    }
    std::fs::write(folder.path().join("sidereal.json"), "{\"phrases\": \"titles\"}")
        .expect("a writable folder");
    let catalog = Catalog::open(&models.join("industrial/items.jsonl")).expect("real items");
    let opened = Engine::open_on(backend(), folder.path(), None, Arc::new(catalog), &options());
    let error = opened.err().expect("phrases");
    assert!(matches!(error, Error::Unsupported { .. }), "{error}");
    assert!(error.to_string().contains("--device cpu"), "{error}");
}

#[test]
#[cfg_attr(not(cpp_compiler), ignore = "needs g++ on x86-64 Linux")]
fn catalogs_that_change_between_requests_are_searched_as_on_the_cpu() {
    check_changes(0..4);
}

#[test]
#[ignore = "a sweep; run it by name"]
fn sweep_of_catalogs_that_change() {
    check_changes(4..25);
}

fn check_changes(seeds: Range<u64>) {
    for seed in seeds {
        let tiny = Tiny::new(seed);
        let mut rng = fastrand::Rng::with_seed(seed ^ 0xca7);
        let catalog = || Arc::clone(&tiny.catalog);
        let writer = CatalogWriter::in_memory(catalog(), &WriterOptions::default());
        let writer = writer.expect("a thread");
        let mut cpu = tiny.open_as(catalog(), &options());
        let mut emulated =
            tiny.open_on(Emulator::backend(Build::Plain, Dtype::F32), catalog(), &options());
        for round in 0..5 {
            let change = |_| random_change(&mut rng, 30, tiny.num_levels(), tiny.num_codes);
            let changes: Vec<Change> = (0..6).map(change).collect();
            writer.apply(&changes).expect("sound changes");
            if round == 3 {
                writer.compact().expect("memory");
            }
            let requests = requests(&mut rng, &tiny, 4);
            let (expected, found) =
                (answers(&mut cpu, &requests), answers(&mut emulated, &requests));
            assert_all_alike(&requests, &expected, &found, 1e-3, &format!("{seed} {round}"));
        }
    }
}

/// What `EngineOptions` allow needs no more memory than was taken when the engine was opened, but for
/// filters, whose copies are made when they are first used, and searches of the whole vocabulary.
#[test]
#[cfg_attr(not(cpp_compiler), ignore = "needs g++ on x86-64 Linux")]
fn memory_is_taken_when_an_engine_is_opened_and_where_there_is_none_the_engine_goes_on() {
    check_memory(0..4);
}

#[test]
#[ignore = "a sweep; run it by name"]
fn sweep_of_memory_that_is_taken() {
    check_memory(4..30);
}

fn check_memory(seeds: Range<u64>) {
    let mut num_failed = 0;
    for seed in seeds {
        let tiny = Tiny::new(seed);
        let mut rng = fastrand::Rng::with_seed(seed);
        let device = Emulator::new(Kernels::load(Build::Plain));
        let memory = device.memory();
        let backend = CudaBackend::new(device, Dtype::F32);
        let mut emulated = tiny.open_on(backend, Arc::clone(&tiny.catalog), &options());
        let mut cpu = tiny.open_as(Arc::clone(&tiny.catalog), &options());
        let free = memory.swap(0, Ordering::Relaxed);
        let mut requests = requests(&mut rng, &tiny, 12);
        for request in &mut requests {
            (request.filter, request.groups) = (None, Vec::new());
            request.constraint = Constraint::Trie;
        }
        let (expected, found) = (answers(&mut cpu, &requests), answers(&mut emulated, &requests));
        assert_all_alike(&requests, &expected, &found, 1e-3, &format!("seed {seed}"));

        let searches = requests.iter().filter(|request| request.candidates.is_empty());
        let filtered: Vec<Request> =
            searches.map(|request| request.clone().with_filter("tag:a | tag:b")).collect();
        // All at once, so that steps have both: who asks for a filter fails, and nobody else.
        let others = &requests[..4];
        let mixed: Vec<Request> = others.iter().chain(&filtered).cloned().collect();
        let mut found = answers(&mut emulated, &mixed);
        let with_filter = found.split_off(others.len());
        assert_all_alike(others, &expected[..4], &found, 1e-3, &format!("seed {seed}, mixed"));
        for answer in with_filter {
            match answer {
                Err(error @ Error::Device { .. }) => {
                    let text = error.to_string();
                    assert!(text.contains("there is no memory for"), "{text}");
                    assert!(text.contains("bytes are needed, 0 are free"), "{text}");
                    num_failed += 1;
                }
                Err(error) => panic!("seed {seed}: {error}"),
                // Where nothing passes the filter, nothing is asked of the device.
                Ok(_) => {}
            }
        }
        emulated.check_integrity().expect("all pages are in one place");
        memory.store(free, Ordering::Relaxed);
        let (expected, found) = (answers(&mut cpu, &filtered), answers(&mut emulated, &filtered));
        for (expected, found) in expected.iter().zip(&found) {
            let (expected, found) =
                (expected.as_ref().expect("CPU"), found.as_ref().expect("memory"));
            assert_alike(&expected.items, &found.items, 1e-3, &format!("seed {seed}, again"));
        }
    }
    assert!(num_failed > 0, "filters need memory");
}

/// Steps are recorded and replayed while weights are copied beside them, and take their places.
#[test]
#[cfg_attr(not(cpp_compiler), ignore = "needs g++ on x86-64 Linux")]
fn weights_that_are_replaced_while_requests_run_answer_as_on_the_cpu() {
    const NAME: &str = "model.layers.0.mlp.down_proj.weight";
    let models = Path::new(env!("CARGO_MANIFEST_DIR")).join("models");
    let folder = models.join("decoder_only/qwen3-tied");
    let golden = std::fs::read_to_string(folder.join("golden.json")).expect("golden answers");
    let golden: serde_json::Value = serde_json::from_str(&golden).expect("golden answers");
    let items = golden["items_index"].as_str().expect("a path");
    let catalog = Catalog::open(&folder.join(items)).expect("a catalogue");
    let catalog = Arc::new(catalog);
    let shapes = Weights::open(&folder).expect("a checkpoint").shapes();
    let (_, shape) = shapes.iter().find(|(name, _)| name == NAME).expect("it is there");
    // Version 1 is the checkpoint's.
    let replacement = |version: u64| {
        let value = |n| (n as f32 * version as f32).sin() / 9.0;
        let values = (0..shape.iter().product()).map(value).collect();
        [(NAME.to_string(), Tensor::new(shape, values))]
    };
    let mut requests: Vec<Request> = (1..5)
        .map(|first| Request::from_tokens((first..first + 30).collect::<Vec<u32>>()))
        .collect();
    requests.iter_mut().for_each(|request| request.beams = 5);
    let backend = Emulator::backend(Build::Plain, Dtype::F32);
    let emulated = Engine::open_on(backend, &folder, None, Arc::clone(&catalog), &options());
    let mut emulated = emulated.expect("a model");
    let opened = emulated.metrics();
    assert_eq!((opened.answered, opened.step_us.count(), opened.cache_misses), (0, 0, 0));
    (0..4).for_each(|_| drop(emulated.recommend(&requests[0]).expect("a sound request")));
    assert!(emulated.run(|backend| backend.traffic().replays) > 0, "steps are replayed");
    let emulated = Recommender::from_engine(emulated, &RecommenderOptions::default());
    let emulated = emulated.expect("a thread");
    let (done, asked) = (AtomicBool::new(false), AtomicUsize::new(0));
    let found: Vec<(usize, Answer)> = std::thread::scope(|scope| {
        let asking = scope.spawn(|| {
            let mut found = Vec::new();
            while !done.load(Ordering::Relaxed) {
                for (index, request) in requests.iter().enumerate() {
                    found.push((index, emulated.recommend(request).expect("a sound request")));
                    asked.fetch_add(1, Ordering::Relaxed);
                }
            }
            found
        });
        let wait = || {
            let enough = asked.load(Ordering::Relaxed) + 10;
            while asked.load(Ordering::Relaxed) < enough && !asking.is_finished() {
                std::thread::yield_now();
            }
        };
        for version in 2..6 {
            wait();
            let replaced = emulated.replace_weights(replacement(version)).expect("sound weights");
            assert_eq!(replaced, version);
        }
        wait();
        done.store(true, Ordering::Relaxed);
        asking.join().expect("it does not panic")
    });
    let mut cpu = Engine::open(&folder, catalog, &options()).expect("a model");
    for version in 1..6 {
        if version > 1 {
            cpu.replace_weights(replacement(version)).expect("sound weights");
        }
        let expected = answers(&mut cpu, &requests);
        let mut of_version =
            found.iter().filter(|(_, answer)| answer.weights_version == version).peekable();
        assert!(of_version.peek().is_some(), "requests ran with weights {version}");
        for (index, answer) in of_version {
            let expected = expected[*index].as_ref().expect("a sound request");
            assert_alike(&expected.items, &answer.items, 1e-3, &format!("weights {version}"));
        }
    }
}

/// Contexts are long enough to be split, prompts are read in chunks that depend on the others, and
/// steps are run eagerly, captured and replayed.
#[test]
#[cfg_attr(not(cpp_compiler), ignore = "needs g++ on x86-64 Linux")]
fn an_answer_has_the_same_bits_alone_and_beside_others() {
    check_company(&[(0, Dtype::Bf16)]);
}

#[test]
#[ignore = "a sweep; run it by name"]
fn sweep_of_answers_alone_and_beside_others() {
    let both = (1..4).flat_map(|seed| [(seed, Dtype::F32), (seed, Dtype::Bf16)]);
    check_company(&both.chain([(0, Dtype::F32)]).collect::<Vec<_>>());
}

fn check_company(cases: &[(u64, Dtype)]) {
    let options =
        options().with_max_context(1200).with_context_tokens(16_384).with_prefix_cache(false);
    for &(seed, dtype) in cases {
        let tiny = Tiny::new(seed);
        let open = || {
            let backend = Emulator::backend(Build::Plain, dtype);
            tiny.open_on(backend, Arc::clone(&tiny.catalog), &options)
        };
        let request = |index: u32| {
            let len: u32 = [480, 3, 440, 70, 470, 300, 257, 400, 20, 1][index as usize];
            let token = |i: u32| (i * 7 + index) % tiny.num_tokens();
            let mut request = Request::from_tokens((0..len).map(token).collect::<Vec<u32>>());
            request.beams = [9, 1, 20, 3, 2, 30, 5, 12, 1, 4][index as usize];
            request.log_probs = index == 4;
            request
        };
        let requests: Vec<Request> = (0..10).map(request).collect();
        let mut alone = open();
        let together = answers(&mut open(), &requests);
        for (index, (request, together)) in requests.iter().zip(&together).enumerate() {
            let alone = alone.recommend(request).expect("a sound request");
            let together = together.as_ref().expect("a sound request");
            let what = format!("seed {seed} {dtype:?} request {index}");
            assert_eq!(alone.items, together.items, "{what}");
        }
    }
}

fn demo(backend: CudaBackend<Emulator>) -> (Engine, Engine<CudaBackend<Emulator>>, Vec<Request>) {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("models/industrial");
    let catalog = Arc::new(Catalog::open(&folder.join("items.jsonl")).expect("the demo's items"));
    let config = Config::read(&folder.join("config.json")).expect("a configuration");
    let vocab_size = sidereal::models::vocab_size(&config).expect("it has one");
    let layout = SidLayout::read(&folder, vocab_size).expect("a layout");
    let weights = Weights::open(&folder).expect("weights");
    let (ours, device) = (Arc::clone(&catalog), catalog);
    let cpu = Engine::open(&folder, ours, &options()).expect("the demo model");
    let emulated = Engine::from_parts(backend, &config, weights, layout, device, &options());
    let users = std::fs::read_to_string(folder.join("test.jsonl")).expect("users");
    let requests = users.lines().take(8).map(|line| {
        let line: serde_json::Value = serde_json::from_str(line).expect("JSON");
        let history = line["history"].as_array().expect("a list").iter();
        let history = history.map(|item| item.as_str().expect("a name").to_string());
        let mut request = Request::from_history(history.collect::<Vec<_>>());
        (request.beams, request.top_k, request.log_probs) = (50, 10, true);
        request
    });
    (cpu, emulated.expect("the demo model"), requests.collect())
}

#[test]
#[cfg_attr(not(cpp_compiler), ignore = "needs g++ on x86-64 Linux")]
fn the_demo_model_answers_as_on_the_cpu_in_f32() {
    let (mut cpu, mut emulated, requests) = demo(Emulator::backend(Build::Plain, Dtype::F32));
    let (expected, found) = (answers(&mut cpu, &requests), answers(&mut emulated, &requests));
    assert_all_alike(&requests, &expected, &found, 1e-4, "demo");
}

#[test]
#[cfg_attr(not(cpp_compiler), ignore = "needs g++ on x86-64 Linux")]
fn the_demo_model_answers_nearly_as_on_the_cpu_in_bf16() {
    let (mut cpu, mut emulated, requests) = demo(Emulator::backend(Build::Plain, Dtype::Bf16));
    let (expected, found) = (answers(&mut cpu, &requests), answers(&mut emulated, &requests));
    let mut common = 0;
    for (expected, found) in expected.iter().zip(&found) {
        let (expected, found) = (expected.as_ref().expect("sound"), found.as_ref().expect("sound"));
        let on_cpu: HashMap<&str, &Recommendation> =
            expected.items.iter().map(|item| (&*item.item, item)).collect();
        for item in &found.items {
            let Some(expected) = on_cpu.get(&*item.item) else { continue };
            let mut pairs = vec![(expected.score, item.score)];
            for (a, b) in expected.log_probs.iter().zip(&item.log_probs) {
                pairs.extend([(a.vocabulary, b.vocabulary), (a.children, b.children)]);
            }
            let alike = pairs.iter().all(|(a, b)| (a - b).abs() < 0.1);
            assert!(alike, "{item:?}, on the CPU {expected:?}");
            common += 1;
        }
    }
    let all: usize = expected.iter().flatten().map(|answer| answer.items.len()).sum();
    assert!(common * 10 >= all * 9, "{common} of {all} items are the CPU's");
}
