//! Programs in C and C++ against the library as it was built.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::{Arc, OnceLock};

use engine::catalog::Catalog;
use engine::{Recommender, RecommenderOptions, Request};

const HISTORY: [&str; 3] = ["168", "278", "17"];

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn model() -> PathBuf {
    root().join("../../models/industrial")
}

/// The folder of the library. Cargo builds no shared library for tests, so this does, beside them.
fn library() -> &'static Path {
    static FOLDER: OnceLock<PathBuf> = OnceLock::new();
    FOLDER.get_or_init(|| {
        let test = std::env::current_exe().expect("this program");
        let folder = test.parent().and_then(Path::parent).expect("target/PROFILE/deps/TEST");
        let target = folder.parent().expect("target/PROFILE");
        let mut build = Command::new(env!("CARGO"));
        build.args(["build", "--quiet", "--manifest-path"]).arg(root().join("Cargo.toml"));
        build.arg("--target-dir").arg(target);
        if folder.ends_with("release") {
            build.arg("--release");
        }
        run(&mut build);
        assert!(folder.join("libsidereal.so").exists(), "no library in {}", folder.display());
        folder.to_path_buf()
    })
}

fn run(command: &mut Command) -> Output {
    let output = command.output().unwrap_or_else(|error| panic!("{command:?}: {error}"));
    let words = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{command:?}: {}\n{words}", output.status);
    output
}

/// Compiles a program of one file.
fn compile(source: &str, flags: &[&str]) -> (tempfile::TempDir, PathBuf) {
    let folder = tempfile::tempdir().expect("a folder");
    let program = folder.path().join("program");
    let compiler =
        if source.ends_with(".cpp") { ["c++", "-std=c++17"] } else { ["cc", "-std=c11"] };
    let mut command = Command::new(compiler[0]);
    command.args([compiler[1], "-Wall", "-Wextra", "-Werror", "-O1", "-g"]).args(flags);
    command.arg(root().join(source)).arg("-I").arg(root().join("include"));
    command.arg("-L").arg(library()).args(["-lsidereal", "-lpthread", "-o"]).arg(&program);
    command.arg(format!("-Wl,-rpath,{}", library().display()));
    run(&mut command);
    // The name by which the program looks for the library.
    let versioned = folder.path().join("libsidereal.so.0");
    std::os::unix::fs::symlink(library().join("libsidereal.so"), versioned).expect("a link");
    (folder, program)
}

fn program(folder: &tempfile::TempDir, program: &Path) -> Command {
    let mut command = Command::new(program);
    command.env("LD_LIBRARY_PATH", folder.path());
    command.arg(model()).arg(model().join("items.jsonl"));
    command
}

/// The lines that the examples should print, made of the library's own answer.
fn expected() -> String {
    let catalog = Catalog::open(&model().join("items.jsonl")).expect("the demo's catalog");
    let options = RecommenderOptions::new("cpu").with_threads(1);
    let recommender =
        Recommender::open(&model(), Arc::new(catalog), &options).expect("the demo's model");
    let request = Request::from_history(HISTORY).with_beams(20);
    let answer = recommender.recommend(&request).expect("an answer");
    let lines = answer.items.iter().map(|found| {
        let codes: Vec<String> = found.sid.codes().iter().map(u16::to_string).collect();
        format!("{} {:08x} {}\n", found.item, found.score.to_bits(), codes.join(" "))
    });
    lines.collect()
}

#[test]
fn programs_in_c_and_in_cpp_get_the_library_s_answers_to_the_last_bit() {
    let twice = expected().repeat(2);
    for source in ["examples/recommend.c", "examples/recommend.cpp"] {
        let (folder, path) = compile(source, &[]);
        let output = run(program(&folder, &path).args(HISTORY));
        assert_eq!(String::from_utf8_lossy(&output.stdout), twice, "{source}");
    }
}

#[test]
fn arguments_that_cannot_be_are_errors() {
    let (folder, path) = compile("tests/abuse.c", &[]);
    run(&mut program(&folder, &path));
}

#[test]
fn a_program_of_the_first_header_works() {
    // The header of the first release is kept beside this test; new fields go behind its own.
    let (folder, path) = compile("examples/recommend.c", &["-I", &first_headers()]);
    let output = run(program(&folder, &path).args(HISTORY));
    assert_eq!(String::from_utf8_lossy(&output.stdout), expected().repeat(2));
}

fn first_headers() -> String {
    let folder = root().join("tests/first");
    assert!(folder.join("sidereal.h").exists());
    folder.display().to_string()
}

#[test]
fn the_library_shows_its_own_names_alone() {
    let symbols = run(Command::new("nm")
        .args(["-D", "--defined-only"])
        .arg(library().join("libsidereal.so")));
    let symbols = String::from_utf8_lossy(&symbols.stdout).into_owned();
    let names: Vec<&str> = symbols.lines().filter_map(|line| line.rsplit(' ').next()).collect();
    assert!(names.len() > 20, "{names:?}");
    let foreign: Vec<_> = names.iter().filter(|name| !name.starts_with("sidereal_")).collect();
    assert!(foreign.is_empty(), "{foreign:?}");
    let dynamic = run(Command::new("readelf").arg("-d").arg(library().join("libsidereal.so")));
    assert!(String::from_utf8_lossy(&dynamic.stdout).contains("libsidereal.so.0"), "its SONAME");
}

/// Accesses outside of what was given, and memory that is not freed.
#[test]
#[ignore = "needs valgrind, and half an hour"]
fn nothing_is_lost_and_nothing_is_read_that_was_not_given() {
    let (folder, path) = compile("tests/abuse.c", &[]);
    let mut command = Command::new("valgrind");
    command.args(["--error-exitcode=9", "--leak-check=full", "--show-leak-kinds=definite"]);
    command.args(["--errors-for-leak-kinds=definite", "--quiet"]).arg(&path);
    command.env("LD_LIBRARY_PATH", folder.path());
    run(command.arg(model()).arg(model().join("items.jsonl")));
}
