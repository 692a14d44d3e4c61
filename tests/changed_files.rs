//! Files that change under a running engine: copied over, cut short, removed, replaced by rename.
//! Answers stay right or become a typed error; nothing panics, and no signal ends the process.

use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::{Arc, mpsc};
use std::time::Duration;

use serde_json::{Value, json};
use sidereal::catalog::{Catalog, CatalogOptions};
use sidereal::{Answer, Engine, EngineOptions, Error, Request, Result, Tensor};

#[path = "common/folders.rs"]
mod folders;

use folders::{Folder, find};

/// What befalls a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fate {
    /// Another file of the same size is copied over it.
    Same,
    /// A larger one is.
    Larger,
    Cut,
    Emptied,
    Lengthened,
    Removed,
    /// Another file takes its name.
    Renamed,
}

const FATES: [Fate; 7] = [
    Fate::Same,
    Fate::Larger,
    Fate::Cut,
    Fate::Emptied,
    Fate::Lengthened,
    Fate::Removed,
    Fate::Renamed,
];

impl Fate {
    /// Whether the old bytes are gone.
    fn is_in_place(self) -> bool {
        !matches!(self, Fate::Removed | Fate::Renamed)
    }

    /// Lets it happen to `path`; `same` and `larger` are files of the same kind.
    fn befall(self, path: &Path, same: &Path, larger: &Path) {
        // Beyond the tick of the clock that stamps files.
        std::thread::sleep(Duration::from_millis(20));
        let set_len = |len: u64| {
            let file = std::fs::OpenOptions::new().write(true).open(path).expect("a file");
            file.set_len(len).expect("a writable file");
        };
        let len = std::fs::metadata(path).expect("a file").len();
        match self {
            Fate::Same => {
                assert_eq!(len, std::fs::metadata(same).expect("a file").len(), "sizes are equal");
                std::fs::copy(same, path).expect("room");
            }
            Fate::Larger => drop(std::fs::copy(larger, path).expect("room")),
            Fate::Cut => set_len(len / 2),
            Fate::Emptied => set_len(0),
            Fate::Lengthened => set_len(len + 1),
            Fate::Removed => std::fs::remove_file(path).expect("a file"),
            Fate::Renamed => {
                let beside = path.with_extension("new");
                std::fs::copy(same, &beside).expect("room");
                std::fs::rename(beside, path).expect("one folder");
            }
        }
    }
}

/// A small model with its catalog as a file, and two other catalogs: one of the same size whose
/// names are others, and a larger one.
struct Place {
    folder: Folder,
    path: PathBuf,
    same: PathBuf,
    larger: PathBuf,
}

impl Place {
    fn new() -> Place {
        let folder = Folder::small();
        let items = String::from_utf8(folder.read("items.jsonl")).expect("UTF-8");
        let build = |name: &str, items: &str| {
            let from = folder.write("items-of.jsonl", items);
            let path = folder.path().join(name);
            Catalog::open(&from).expect("sound items").save(&path).expect("room");
            path
        };
        let more = json!({"item": "more", "sid": [1, 2, 3], "title": "one more"}).to_string();
        let (path, larger) =
            (build("c.sidereal", &items), build("larger.sidereal", &(items.clone() + &more)));
        let same = build("same.sidereal", &items.replace("\"item\":\"i", "\"item\":\"j"));
        Place { folder, path, same, larger }
    }

    fn open(&self, map_above: u64) -> (Arc<Catalog>, Engine) {
        let options = CatalogOptions::default().with_map_above(map_above);
        let catalog = Arc::new(Catalog::open_with(&self.path, &options).expect("a catalog"));
        let options = EngineOptions::default().with_threads(1);
        let engine = Engine::open(self.folder.path(), Arc::clone(&catalog), &options);
        (catalog, engine.expect("a sound model"))
    }

    fn befall(&self, fate: Fate) {
        fate.befall(&self.path, &self.same, &self.larger);
    }
}

fn requests() -> Vec<Request> {
    let history = |number: usize| Request::from_history([format!("i{number}"), "i3".into()]);
    (0..4).map(|number| history(5 * number)).collect()
}

fn ask(engine: &mut Engine) -> Result<Vec<Answer>> {
    requests().iter().map(|request| engine.recommend(request)).collect()
}

#[test]
fn a_catalog_in_memory_is_out_of_reach_of_its_file() {
    for fate in FATES {
        let place = Place::new();
        let (catalog, mut engine) = place.open(CatalogOptions::DEFAULT_MAP_ABOVE);
        assert!(!catalog.snapshot().base().is_mapped());
        let before = ask(&mut engine).expect("sound requests");
        place.befall(fate);
        assert_eq!(ask(&mut engine).expect("sound requests"), before, "{fate:?}");
    }
}

#[test]
fn a_mapped_catalog_that_was_written_to_is_an_error_and_never_an_answer() {
    for fate in FATES {
        let place = Place::new();
        let (catalog, mut engine) = place.open(0);
        assert!(catalog.snapshot().base().is_mapped());
        let before = ask(&mut engine).expect("sound requests");
        place.befall(fate);
        for _ in 0..2 {
            match ask(&mut engine) {
                Err(Error::FileChanged { path }) if fate.is_in_place() => {
                    assert_eq!(path, place.path, "{fate:?}");
                }
                Ok(after) if !fate.is_in_place() => assert_eq!(after, before, "{fate:?}"),
                other => panic!("{fate:?}: {other:?}"),
            }
        }
        assert_eq!(catalog.snapshot().check_file().is_err(), fate.is_in_place(), "{fate:?}");
        engine.check_integrity().expect("all pages");
    }
}

#[test]
fn a_request_that_runs_or_waits_while_its_catalog_is_written_to_is_told() {
    for fate in FATES {
        for steps_before in 0..4 {
            let place = Place::new();
            let (_, mut engine) = place.open(0);
            let (sender, told) = mpsc::channel();
            for request in requests() {
                let sender = sender.clone();
                let callback = move |answer| drop(sender.send(answer));
                engine.submit(request, callback).expect("a sound request");
            }
            for _ in 0..steps_before {
                engine.step().expect("it steps");
            }
            let is_early = told.try_recv().is_err();
            place.befall(fate);
            while !engine.is_idle() {
                engine.step().expect("it steps");
            }
            for answer in told.try_iter() {
                let is_lost = matches!(answer, Err(Error::FileChanged { .. }));
                assert_eq!(is_lost, fate.is_in_place() && is_early, "{fate:?}: {answer:?}");
            }
            engine.check_integrity().expect("all pages");
        }
    }
}

const EMBEDDING: &str = "model.embed_tokens.weight";

#[test]
fn weights_are_copies_and_their_file_is_checked_before_it_is_read_again() {
    for fate in FATES {
        let place = Place::new();
        let folder = &place.folder;
        let path = folder.path().join("model.safetensors");
        let original = folder.read("model.safetensors");
        // The same shapes with other numbers, and a file with a tensor more.
        folder.edit_weights(|tensors| find(tensors, EMBEDDING).data.fill(0));
        let same = folder.write("same", folder.read("model.safetensors"));
        let larger = folder.write("larger", [&original[..], b"more"].concat());
        std::fs::write(&path, &original).expect("room");
        let (_, mut engine) = place.open(u64::MAX);
        let before = ask(&mut engine).expect("sound requests");
        fate.befall(&path, &same, &larger);
        assert_eq!(ask(&mut engine).expect("sound requests"), before, "{fate:?}");

        let norm = ("model.norm.weight".to_string(), Tensor::new(&[96], vec![1.0; 96]));
        match engine.replace_weights([norm]) {
            Err(Error::FileChanged { path: found }) if fate.is_in_place() => {
                assert_eq!(found, path);
                assert_eq!(ask(&mut engine).expect("sound requests"), before, "{fate:?}");
            }
            Ok(version) if !fate.is_in_place() => assert_eq!(version, 2),
            other => panic!("{fate:?}: {other:?}"),
        }
    }
}

/// Lines that the command line answers at a time.
const STRETCH: usize = 4096;

#[test]
fn the_command_line_outlives_what_happens_to_its_catalog() {
    for (map_above, fate) in [
        ("1024", Fate::Same),
        ("1024", Fate::Cut),
        ("0", Fate::Same),
        ("0", Fate::Emptied),
        ("0", Fate::Renamed),
    ] {
        let place = Place::new();
        let [model, catalog] =
            [place.folder.path(), &place.path].map(|path| path.to_str().expect("plain"));
        let mut child = Command::new(env!("CARGO_BIN_EXE_sidereal"))
            .args(["recommend", "--model", model, "--catalog", catalog, "--requests", "-"])
            .args(["--map-catalog-above", map_above, "--threads", "1"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("the binary of this build");
        let mut input = child.stdin.take().expect("piped");
        let mut answers = BufReader::new(child.stdout.take().expect("piped")).lines();
        let stretch = |input: &mut dyn Write| {
            // All lines but the first are cheap.
            let request = json!({"history": ["i0", "i3"]}).to_string();
            let lines = request + "\n" + &"{}\n".repeat(STRETCH - 1);
            input.write_all(lines.as_bytes()).expect("the child reads");
        };
        let mut line = || answers.next().expect("a line").expect("UTF-8");
        let parsed = |line: String| serde_json::from_str::<Value>(&line).expect("JSON");
        stretch(&mut input);
        let before = parsed(line());
        place.befall(fate);
        stretch(&mut input);
        drop(input);
        (1..STRETCH).for_each(|_| drop(line()));
        let after = parsed(line());
        (1..STRETCH).for_each(|_| drop(line()));
        match map_above == "0" && fate.is_in_place() {
            true => assert_eq!(after["error"]["code"], "file_changed", "{fate:?}"),
            false => assert_eq!(after, before, "{fate:?}"),
        }
        assert!(before["items"].as_array().is_some_and(|items| !items.is_empty()), "{before}");
        let output = child.wait_with_output().expect("the child ends");
        assert_eq!(output.status.code(), Some(1), "{}", String::from_utf8_lossy(&output.stderr));
    }
}
