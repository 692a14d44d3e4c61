//! Networks that give vectors or score candidates, on the emulator: their answers are the CPU's. That
//! the CPU's are the published networks' own is told by `golden.rs`.
//!
//! Without g++ on x86-64 Linux these tests are ignored.

mod common;

use std::path::{Path, PathBuf};
use std::sync::Arc;

use common::emulator::Emulator;
use common::kernels::Build;
use serde_json::{Value, json};
use sidereal::catalog::Catalog;
use sidereal::wire::{RequestDefaults, RequestLine};
use sidereal::{Answer, Dtype, Error, Ranker, RecommenderOptions, Request, Result, Retriever};

/// The folders of a family, each with its catalog and the requests of its golden file.
fn folders(family: &str) -> Vec<(PathBuf, Arc<Catalog>, Vec<Request>)> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("models").join(family);
    let entries =
        std::fs::read_dir(&path).expect("a folder").map(|entry| entry.expect("it").path());
    let of_folder = |folder: PathBuf| {
        let text = std::fs::read(folder.join("golden.json")).expect("a golden file");
        let golden: Value = serde_json::from_slice(&text).expect("JSON");
        let cases = golden["cases"].as_array().expect("cases").iter().map(|case| {
            let Value::Object(fields) = (match case.get("request") {
                Some(request) => request.clone(),
                None => json!({"history": case["history"], "time": case["time"]}),
            }) else {
                panic!("a request is an object")
            };
            let line = RequestLine::from_fields(fields).expect("a request");
            line.to_request(&RequestDefaults::default()).expect("a request")
        });
        let catalog = Arc::new(Catalog::open(&folder.join("items.jsonl")).expect("items"));
        (folder, catalog, cases.collect())
    };
    entries.map(of_folder).collect()
}

fn options() -> RecommenderOptions {
    RecommenderOptions::new("cpu").with_threads(1).with_dtype(Dtype::F32)
}

fn assert_alike(cpu: Result<Answer>, emulated: Result<Answer>, what: &str) {
    match (cpu, emulated) {
        (Ok(cpu), Ok(found)) => {
            assert_eq!(cpu.items.len(), found.items.len(), "{what}");
            for (cpu, found) in cpu.items.iter().zip(&found.items) {
                // Items of nearly equal scores may have changed places.
                assert!((cpu.score - found.score).abs() < 1e-4, "{what}: {found:?}, not {cpu:?}");
                for (cpu, found) in cpu.tasks.iter().zip(&found.tasks) {
                    assert!((cpu.score - found.score).abs() < 1e-4, "{what}: {found:?}");
                }
            }
        }
        (Err(Error::EmptyInput), Err(Error::EmptyInput)) => {}
        (cpu, emulated) => panic!("{what}: {emulated:?}, not {cpu:?}"),
    }
}

fn check_vectors(family: &str, build: Build) {
    for (folder, catalog, requests) in folders(family) {
        let cpu = Retriever::open(&folder, Arc::clone(&catalog), &options()).expect("a model");
        let backend = Emulator::backend(build, Dtype::F32);
        let emulated = Retriever::open_on(backend, &folder, catalog, &options()).expect("a model");
        let alone: Vec<_> = requests.iter().map(|request| emulated.recommend(request)).collect();
        for ((request, found), together) in
            requests.iter().zip(alone).zip(emulated.recommend_all(&requests))
        {
            let what = format!("{} {request:?}", folder.display());
            if let (Ok(found), Ok(together)) = (&found, &together) {
                assert_eq!(found.items, together.items, "{what}: alone and among others");
            }
            assert_alike(cpu.recommend(request), found, &what);
        }
    }
}

#[test]
#[cfg_attr(not(cpp_compiler), ignore = "needs g++ on x86-64 Linux")]
fn vectors_of_sasrec_are_those_of_the_cpu() {
    check_vectors("sasrec", Build::Plain);
}

#[test]
#[cfg_attr(not(cpp_compiler), ignore = "needs g++ on x86-64 Linux")]
fn vectors_of_bert4rec_are_those_of_the_cpu() {
    check_vectors("bert4rec", Build::Plain);
}

#[test]
#[cfg_attr(not(cpp_compiler), ignore = "needs g++ on x86-64 Linux")]
fn vectors_of_gru4rec_are_those_of_the_cpu() {
    check_vectors("gru4rec", Build::Plain);
}

#[test]
#[cfg_attr(not(cpp_compiler), ignore = "needs g++ on x86-64 Linux")]
fn vectors_of_hstu_are_those_of_the_cpu_checked() {
    check_vectors("hstu", Build::Checked);
}

#[test]
#[cfg_attr(not(cpp_compiler), ignore = "needs g++ on x86-64 Linux")]
fn scores_of_dlrm_hstu_are_those_of_the_cpu_checked() {
    for (folder, catalog, requests) in folders("dlrm_hstu") {
        let cpu = Ranker::open(&folder, Arc::clone(&catalog), &options()).expect("a model");
        let backend = Emulator::backend(Build::Checked, Dtype::F32);
        let emulated = Ranker::open_on(backend, &folder, catalog, &options()).expect("a model");
        for request in &requests {
            let what = format!("{} {request:?}", folder.display());
            assert_alike(cpu.recommend(request), emulated.recommend(request), &what);
        }
    }
}
