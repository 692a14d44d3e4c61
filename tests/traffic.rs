//! What a step of beams asks of the device, counted.
//!
//! In a file of its own: the counters are those of a process. Without a C++ compiler this test is
//! ignored.

mod common;

use std::slice;
use std::sync::Arc;

use common::emulator::Emulator;
use common::kernels::{Build, Kernels};
use common::tiny::Tiny;
use sidereal::backend::cuda::CudaBackend;
use sidereal::backend::prelude::*;
use sidereal::backend::testing::{Cases, Fixture};
use sidereal::backend::{AttentionSpec, Batch, Heads, KvScope, SearchRule};
use sidereal::catalog::sid::Sid;
use sidereal::catalog::{CatalogBuilder, Item};
use sidereal::{Dtype, Engine, EngineOptions, Request, Tensor};

const HEADS: Heads = Heads::new(4, 2, 64);

#[test]
#[cfg_attr(not(cpp_compiler), ignore = "needs g++ on x86-64 Linux")]
fn a_step_reads_each_context_once_copies_no_keys_or_values_and_waits_for_nothing() {
    bytes_of_a_step();
    steps_of_an_engine();
}

/// Bytes of keys and values that attention and the choice of beams touch.
fn bytes_of_a_step() {
    let kernels = Kernels::load(Build::Checked);
    let backend = CudaBackend::new(Emulator::new(Arc::clone(&kernels)), Dtype::Bf16);
    let mut cases = Cases::new(1);
    let mut builder = CatalogBuilder::default();
    for item in 0..400u16 {
        let sid = Sid::new(&[item % 20, item / 20]).expect("two levels");
        builder.add(Item::new(item.to_string(), sid)).expect("levels agree");
    }
    let snapshot = builder.build().expect("names are unique").snapshot();
    let allowed_set = snapshot.allowed_set(&[], None).expect("no filter");
    let mut fixture = Fixture::new(&backend, HEADS).expect("memory");
    let context_len = 300;
    let mut slots = vec![fixture.slot(context_len)];
    let kv = backend.upload(&cases.numbers(context_len * 2 * HEADS.kv_dim()), 2 * HEADS.kv_dim());
    let whole = 0..context_len;
    let batch = Batch::new(&fixture.memory, slice::from_ref(&whole), &mut slots);
    backend.store_context(0, &kv, 0, HEADS, &batch);
    let levels = [0, 20].map(|first| (first..first + 20).collect());
    let head = Tensor::new(&[40, 8], cases.numbers(40 * 8));
    let (head, mut logits) = (backend.head(head, &levels, &[]).expect("memory"), backend.logits());
    let downloads = backend.traffic().downloads;
    for level in 0..2 {
        let written = kernels.bytes_written("contexts") + kernels.bytes_written("tails");
        let rules = [SearchRule::new(&snapshot, &allowed_set, level, 20)];
        let rows = backend.num_beams(&slots[0]);
        let hidden = backend.upload(&cases.numbers(rows * 8), 8);
        let mut pass = Batch::new(&fixture.memory, &[], &mut slots);
        backend.lm_head(&hidden, &head, &rules, &mut pass, &mut logits);
        backend.advance_beams(&logits, &head, &rules, &mut pass);
        let moved = kernels.bytes_written("contexts") + kernels.bytes_written("tails") - written;
        assert_eq!(moved, 0, "beams in another order move no keys or values");

        let rows = backend.num_beams(&slots[0]);
        let qkv = backend.upload(&cases.numbers(rows * HEADS.qkv_dim()), HEADS.qkv_dim());
        let mut batch = Batch::new(&fixture.memory, &[], &mut slots);
        let written = kernels.bytes_written("tails");
        backend.append_tail(0, &qkv, HEADS, &mut batch);
        let appended = kernels.bytes_written("tails") - written;
        assert_eq!(appended as usize, rows * 2 * HEADS.kv_dim() * 2, "a row a beam");

        let (read, written) = (kernels.bytes_read("contexts"), kernels.bytes_written("contexts"));
        let mut out = backend.buffer();
        let attention = AttentionSpec::softmax(HEADS, KvScope::Both, 0.3);
        backend.attend_beams(0, &qkv, &attention, &batch, &mut out);
        let of_context = (kernels.bytes_read("contexts") - read) as usize;
        assert_eq!(of_context, context_len * 2 * HEADS.kv_dim() * 2, "once for all beams");
        assert_eq!(kernels.bytes_written("contexts"), written);
    }
    assert_eq!(backend.traffic().downloads, downloads, "nothing was waited for");
    backend.check().expect("the device works");
}

/// What an engine asks for while requests run whose shapes it has seen.
fn steps_of_an_engine() {
    let (mut num_searches, mut num_replays) = (0, 0);
    for seed in 0..12 {
        let tiny = Tiny::new(seed);
        let options = EngineOptions::default()
            .with_threads(1)
            .with_context_tokens(1024)
            .with_max_context(200)
            .with_max_beam_rows(512)
            .with_rows_per_step(32)
            .with_prefix_cache(false);
        let backend = Emulator::backend(Build::Plain, Dtype::F32);
        let mut engine = tiny.open_on(backend, Arc::clone(&tiny.catalog), &options);
        let request = |tokens: u32| {
            let tokens: Vec<u32> = (0..tokens).map(|i| i % tiny.num_tokens()).collect();
            let mut request = Request::from_tokens(tokens);
            request.beams = 8;
            request
        };
        // Twice: a shape is seen, then recorded.
        engine.recommend(&request(70)).expect("a sound request");
        engine.recommend(&request(70)).expect("a sound request");
        let before = engine.run(|backend| backend.traffic());
        let answers = 3;
        for tokens in [70, 66, 80] {
            engine.recommend(&request(tokens)).expect("a sound request");
        }
        let after = engine.run(|backend| backend.traffic());
        assert_eq!(after.downloads - before.downloads, answers, "one copy for each answer");
        assert_eq!(after.allocations, before.allocations, "memory was taken before");
        // A search behind an encoder begins in the pass that reads its prompt.
        let decode_steps = answers * (tiny.num_steps() as u64 - 1);
        assert_eq!(after.replays - before.replays, decode_steps, "seed {seed}");
        num_searches += answers;
        num_replays += after.replays - before.replays;

        // Requests at different levels share steps, which are replayed as well.
        let mut staggered = || {
            let before = engine.run(|backend| backend.traffic()).replays;
            let mut num_steps = 0;
            let mut step = |engine: &mut Engine<_>| {
                num_steps += 1;
                engine.step().expect("it goes on");
            };
            for tokens in [70, 72] {
                engine.submit(request(tokens), drop).expect("a sound request");
                step(&mut engine);
            }
            while engine.status().running > 0 {
                step(&mut engine);
            }
            (engine.run(|backend| backend.traffic()).replays - before, num_steps)
        };
        staggered();
        staggered();
        let (replays, num_steps) = staggered();
        // Two steps read a prompt.
        assert_eq!(replays, num_steps - 2, "seed {seed}");

        // Several requests of one wave are read together.
        let requests = [70, 70, 70].map(request);
        let before = engine.run(|backend| backend.traffic());
        engine.recommend_all(&requests, |_, answer| assert!(answer.is_ok()));
        let after = engine.run(|backend| backend.traffic());
        assert_eq!(after.downloads - before.downloads, 1, "one copy for a wave");
    }
    assert!(num_searches > 0 && num_replays > num_searches, "steps are replayed");
}
