//! The kernels, compiled for the CPU with the emulator of `kernels/emulator`.
//!
//! Needs g++ for x86-64 Linux, or a GCC that `CXX` names.
#![allow(unsafe_code)] // calls what was compiled

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::ffi::{CStr, CString, c_char, c_int, c_void};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Arc, Mutex, OnceLock};

use libloading::Library;
use sidereal::backend::cuda::Address;
use sidereal::{Error, Result};

/// How the kernels are compiled.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Build {
    /// Every access is checked.
    Checked,
    /// Several times faster.
    Plain,
}

/// Kernels that were compiled and loaded.
pub struct Kernels {
    pub library: Library,
    schedule: Mutex<Schedule>,
}

type LaunchFn = unsafe extern "C" fn(
    name: *const c_char,
    grid: *const u32,
    block: *const u32,
    shared_bytes: usize,
    params: *const c_void,
    params_bytes: usize,
    order: c_int,
    seed: u64,
) -> c_int;

/// The order in which the threads of a block run.
#[derive(Debug, Clone, Copy)]
pub enum Schedule {
    Ascending,
    Descending,
    Random(u64),
}

/// The texts of the kernels and of the emulator, by their names within `kernels`.
struct Sources(BTreeMap<String, String>);

impl Sources {
    fn read(replaced: &HashMap<&str, String>) -> Sources {
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("kernels");
        let mut texts = BTreeMap::new();
        let folders = ["common", "emulator", "generated"].map(|name| root.join(name));
        for folder in [root.clone()].into_iter().chain(folders) {
            for entry in std::fs::read_dir(&folder).expect("a folder of the repository") {
                let path = entry.expect("a readable folder").path();
                let extension = path.extension().and_then(|extension| extension.to_str());
                if matches!(extension, Some("cu" | "cuh" | "h" | "cpp")) {
                    let name = path.strip_prefix(&root).expect("within").to_string_lossy();
                    let text = std::fs::read_to_string(&path).expect("a readable source");
                    texts.insert(name.into_owned(), text);
                }
            }
        }
        for (&name, text) in replaced {
            texts.insert(name.to_string(), text.clone());
        }
        Sources(texts)
    }

    fn translation_units(&self) -> impl Iterator<Item = &str> {
        let is_unit = |name: &&String| name.ends_with(".cu") || name.ends_with(".cpp");
        self.0.keys().filter(is_unit).map(String::as_str)
    }

    /// A name for what a file and all that it includes are compiled to.
    fn object_name(&self, unit: &str, build: Build) -> String {
        let mut included = BTreeSet::from([unit.to_string()]);
        let mut open = vec![unit.to_string()];
        while let Some(name) = open.pop() {
            let folder = Path::new(&name).parent().expect("a file has one").to_path_buf();
            for line in self.0[&name].lines() {
                let Some(path) = line.strip_prefix("#include \"") else { continue };
                let path = path.trim_end_matches('"');
                // Within `kernels`, folders are one deep.
                let other = match path.strip_prefix("../") {
                    Some(path) => path.to_string(),
                    None => folder.join(path).to_string_lossy().into_owned(),
                };
                if self.0.contains_key(&other) && included.insert(other.clone()) {
                    open.push(other);
                }
            }
        }
        let mut hasher = DefaultHasher::new();
        (build, compiler(), FLAGS).hash(&mut hasher);
        included.iter().for_each(|name| (name, &self.0[name]).hash(&mut hasher));
        let stem = Path::new(unit).file_stem().expect("a file has one").to_string_lossy();
        format!("{stem}-{:016x}.o", hasher.finish())
    }

    fn write(&self) -> tempfile::TempDir {
        let folder = tempfile::tempdir_in(place()).expect("a writable folder");
        for (name, text) in &self.0 {
            let to = folder.path().join(name);
            std::fs::create_dir_all(to.parent().expect("within")).expect("a writable folder");
            std::fs::write(to, text).expect("a writable folder");
        }
        folder
    }
}

/// Where tests keep what they make.
fn place() -> &'static Path {
    Path::new(env!("CARGO_TARGET_TMPDIR"))
}

fn compiler() -> String {
    std::env::var("CXX").unwrap_or_else(|_| "g++".into())
}

const FLAGS: [&str; 8] = [
    "-std=c++17",
    "-O2",
    "-g1",
    "-fPIC",
    "-Wall",
    "-Wno-unknown-pragmas",
    "-Wno-psabi",
    "-ftls-model=initial-exec",
];
/// Call the checker at every access.
const HOOKS: [&str; 3] = ["-fsanitize=thread", "--param", "tsan-instrument-func-entry-exit=0"];

fn compile(folder: &Path, unit: &str, object: &Path, build: Build) {
    let made = tempfile::NamedTempFile::new_in(place()).expect("a writable folder");
    let mut command = Command::new(compiler());
    command.args(FLAGS).arg("-c").arg("-o").arg(made.path());
    if unit.ends_with(".cu") {
        if build == Build::Checked {
            command.args(HOOKS);
        }
        command.args(["-x", "c++"]);
    }
    run(command.arg(folder.join(unit)));
    made.persist(object).expect("a writable folder");
}

fn run(command: &mut Command) {
    let output = command.output().expect("a C++ compiler");
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{command:?}:\n{errors}");
}

impl Kernels {
    /// The repository's kernels, compiled once for all tests of a process.
    pub fn load(build: Build) -> Arc<Kernels> {
        static LOADED: [OnceLock<Arc<Kernels>>; 2] = [OnceLock::new(), OnceLock::new()];
        let loaded = &LOADED[usize::from(build == Build::Plain)];
        Arc::clone(loaded.get_or_init(|| Arc::new(Kernels::compile(build, &HashMap::new()))))
    }

    /// The kernels with some files added or replaced by other texts, by their names within
    /// `kernels`. What was compiled before is kept.
    pub fn compile(build: Build, replaced: &HashMap<&str, String>) -> Kernels {
        let sources = Sources::read(replaced);
        let objects: Vec<(String, PathBuf)> = sources
            .translation_units()
            .map(|name| (name.to_string(), place().join(sources.object_name(name, build))))
            .collect();
        let missing: Vec<&(String, PathBuf)> =
            objects.iter().filter(|(_, object)| !object.exists()).collect();
        if !missing.is_empty() {
            let folder = sources.write();
            std::thread::scope(|scope| {
                for half in missing.chunks(missing.len().div_ceil(2)) {
                    let folder = folder.path();
                    scope.spawn(move || {
                        half.iter().for_each(|(name, object)| compile(folder, name, object, build));
                    });
                }
            });
        }
        let mut hasher = DefaultHasher::new();
        objects.hash(&mut hasher);
        let path = place().join(format!("kernels-{:016x}.so", hasher.finish()));
        if !path.exists() {
            let made = tempfile::NamedTempFile::new_in(place()).expect("a writable folder");
            let mut link = Command::new(compiler());
            // The hooks of the checker are the library's own.
            link.args(["-shared", "-Wl,-Bsymbolic", "-lpthread", "-o"]).arg(made.path());
            run(link.args(objects.iter().map(|(_, object)| object)));
            made.persist(&path).expect("a writable folder");
        }
        // SAFETY: the library is ours, and its constructors only register kernels.
        let library = unsafe { Library::new(&path) }.expect("a library that was just compiled");
        Kernels { library, schedule: Mutex::new(Schedule::Ascending) }
    }

    /// For all launches to come.
    pub fn set_schedule(&self, schedule: Schedule) {
        *self.schedule.lock().expect("sound") = schedule;
    }

    /// Memory that others than kernels wrote.
    pub fn note_write(&self, at: Address, bytes: usize) {
        // SAFETY: checker.cpp declares it so.
        unsafe {
            let note = self
                .library
                .get::<unsafe extern "C" fn(*const c_void, usize)>("emulator_note_write");
            note.expect("in checker.cpp")(at.get() as *const c_void, bytes);
        }
    }

    /// Bytes of a buffer that kernels have read since it was made, where accesses are checked.
    pub fn bytes_read(&self, name: &str) -> u64 {
        let name = CString::new(name).expect("no zero");
        // SAFETY: checker.cpp declares it so.
        unsafe {
            let read = self
                .library
                .get::<unsafe extern "C" fn(*const c_char) -> u64>("emulator_bytes_read");
            read.expect("in checker.cpp")(name.as_ptr())
        }
    }

    /// Likewise, those written.
    pub fn bytes_written(&self, name: &str) -> u64 {
        let name = CString::new(name).expect("no zero");
        // SAFETY: checker.cpp declares it so.
        unsafe {
            let written = self
                .library
                .get::<unsafe extern "C" fn(*const c_char) -> u64>("emulator_bytes_written");
            written.expect("in checker.cpp")(name.as_ptr())
        }
    }

    /// Launches a kernel of any name: for tests of the emulator itself.
    ///
    /// # Errors
    /// What the emulator found.
    pub fn launch(
        &self,
        kernel: &str,
        grid: [u32; 3],
        threads: u32,
        shared: usize,
        params: &[u8],
    ) -> Result<()> {
        let name = CString::new(kernel).expect("no zero");
        let block = [threads, 1, 1];
        let (order, seed) = match *self.schedule.lock().expect("sound") {
            Schedule::Ascending => (0, 1),
            Schedule::Descending => (1, 1),
            Schedule::Random(seed) => (2, seed),
        };
        // SAFETY: scheduler.cpp declares them so; what a kernel touches is checked against the
        // memory that was allocated, and the guard pages around it.
        unsafe {
            let launch = self.library.get::<LaunchFn>("emulator_launch").expect("in scheduler.cpp");
            let params_at = params.as_ptr().cast();
            let failed = launch(
                name.as_ptr(),
                grid.as_ptr(),
                block.as_ptr(),
                shared,
                params_at,
                params.len(),
                order,
                seed,
            );
            if failed == 0 {
                return Ok(());
            }
            let error =
                self.library.get::<unsafe extern "C" fn() -> *const c_char>("emulator_last_error");
            let text = CStr::from_ptr(error.expect("in scheduler.cpp")());
            Err(device_error(&text.to_string_lossy()))
        }
    }
}

pub fn device_error(reason: &str) -> Error {
    Error::Device { device: "emulator".into(), reason: reason.into() }
}
