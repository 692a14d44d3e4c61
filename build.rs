//! Compiles the kernels where the feature `cuda` asks for them, and says what tests can be run: those
//! that run kernels on the CPU need a compiler, those of instructions a processor that has them.

use std::env;
use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

/// What the fat binary holds: code for Ampere and for Hopper, and PTX for what comes later.
const ARCHITECTURES: [&str; 3] = [
    "arch=compute_80,code=sm_80",
    "arch=compute_90a,code=sm_90a",
    "arch=compute_90,code=compute_90",
];

fn main() {
    for variable in ["CXX", "NVCC", "CUDA_HOME", "CUDA_PATH", "PATH"] {
        println!("cargo:rerun-if-env-changed={variable}");
    }
    println!("cargo:rerun-if-changed=build.rs");
    println!("cargo:rerun-if-changed=kernels");
    println!(
        "cargo:rustc-check-cfg=cfg(cpp_compiler, has_kernels, has_amx, has_avx512_bf16, has_avx512_vnni)"
    );
    // The emulator switches stacks of x86-64, reads ELF headers, and has GCC call its checks.
    let compiler = env::var("CXX").unwrap_or_else(|_| "g++".into());
    let is_gcc = version(Path::new(&compiler))
        .is_some_and(|version| version.contains("Free Software Foundation"));
    let target = |part: &str| env::var(format!("CARGO_CFG_TARGET_{part}")).unwrap_or_default();
    if is_gcc && target("ARCH") == "x86_64" && target("OS") == "linux" {
        println!("cargo:rustc-cfg=cpp_compiler");
    }
    if has_processor_flag("amx_bf16") && may_use_tiles() {
        println!("cargo:rustc-cfg=has_amx");
    }
    if has_processor_flag("avx512_bf16") {
        println!("cargo:rustc-cfg=has_avx512_bf16");
    }
    if has_processor_flag("avx512_vnni") {
        println!("cargo:rustc-cfg=has_avx512_vnni");
    }
    if env::var_os("CARGO_FEATURE_CUDA").is_some() {
        compile_kernels();
    }
    #[cfg(feature = "server")]
    compile_protocol();
}

/// Makes the messages and services of the server's gRPC door, and the descriptors that its
/// reflection shows.
#[cfg(feature = "server")]
fn compile_protocol() {
    const FOLDER: &str = "src/server/protocol";
    println!("cargo:rerun-if-changed={FOLDER}/inference.proto");
    let files = protox::compile(["inference.proto"], [FOLDER]).expect("the file is sound");
    let out = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets it"));
    let descriptors = protox::prost::Message::encode_to_vec(&files);
    fs::write(out.join("inference.bin"), descriptors).expect("the output folder can be written to");
    tonic_prost_build::configure()
        .build_client(false)
        .skip_debug(["."])
        .compile_fds(files)
        .expect("the output folder can be written to");
}

/// Whether Linux says that the processor has something: for tests that are ignored without it.
fn has_processor_flag(flag: &str) -> bool {
    let text = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let flags = text.lines().find(|line| line.starts_with("flags")).unwrap_or_default();
    flags.split_whitespace().any(|other| other == flag)
}

/// Whether the system lets processes use the tiles of AMX; a container may forbid it.
fn may_use_tiles() -> bool {
    #[cfg(all(target_os = "linux", target_arch = "x86_64"))]
    {
        const ARCH_REQ_XCOMP_PERM: libc::c_long = 0x1023;
        const XFEATURE_XTILEDATA: libc::c_long = 18;
        // SAFETY: the call changes nothing but what instructions this process may use.
        #[allow(unsafe_code)]
        let result =
            unsafe { libc::syscall(libc::SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) };
        result == 0
    }
    #[cfg(not(all(target_os = "linux", target_arch = "x86_64")))]
    false
}

/// What a compiler says of itself, where it is there.
fn version(compiler: &Path) -> Option<String> {
    let output = Command::new(compiler).arg("--version").output().ok()?;
    output.status.success().then(|| String::from_utf8_lossy(&output.stdout).into_owned())
}

/// The compiler named by `NVCC`, or else that of `CUDA_HOME` or `CUDA_PATH`, or else the one on the
/// path; where it is not, those that were tried.
fn nvcc() -> Result<PathBuf, Vec<PathBuf>> {
    let named = env::var_os("NVCC").map(PathBuf::from);
    let homes = ["CUDA_HOME", "CUDA_PATH"].into_iter().filter_map(env::var_os);
    let in_homes: Vec<PathBuf> = homes.map(|home| Path::new(&home).join("bin/nvcc")).collect();
    let tried = match (named, in_homes.is_empty()) {
        (Some(named), _) => vec![named],
        (None, false) => in_homes,
        (None, true) => vec!["nvcc".into(), "/usr/local/cuda/bin/nvcc".into()],
    };
    tried.iter().find(|nvcc| version(nvcc).is_some()).cloned().ok_or(tried)
}

fn compile_kernels() {
    let out = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets it"));
    let fat_binary = out.join("kernels.fatbin");
    let nvcc = match nvcc() {
        Ok(nvcc) => nvcc,
        Err(tried) => {
            println!(
                "cargo:warning=nvcc was not found (tried: {tried:?}): this build has no kernels and \
                 refuses the device \"cuda\". Install the CUDA toolkit (13.0 was tried) and set NVCC \
                 or CUDA_HOME"
            );
            fs::write(&fat_binary, []).expect("OUT_DIR is writable");
            return;
        }
    };
    println!("cargo:rustc-cfg=has_kernels");
    // One file of all kernels makes one fat binary.
    let folder =
        Path::new(&env::var_os("CARGO_MANIFEST_DIR").expect("cargo sets it")).join("kernels");
    let entries = fs::read_dir(&folder).expect("the kernels are beside build.rs");
    let mut kernels: Vec<PathBuf> =
        entries.map(|entry| entry.expect("a readable folder").path()).collect();
    kernels.retain(|path| path.extension().is_some_and(|extension| extension == "cu"));
    kernels.sort();
    let mut all = String::new();
    for kernel in &kernels {
        writeln!(all, "#include \"{}\"", kernel.display()).expect("text takes all");
    }
    let source = out.join("kernels.cu");
    fs::write(&source, all).expect("OUT_DIR is writable");
    let mut command = Command::new(&nvcc);
    command.args(["-fatbin", "-std=c++17", "-O3", "--threads", "0", "-Xptxas", "-warn-spills"]);
    ARCHITECTURES.iter().for_each(|architecture| {
        command.args(["-gencode", architecture]);
    });
    let output = command.arg(&source).arg("-o").arg(&fat_binary).output().expect("it answered");
    let messages = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{command:?}:\n{messages}");
    for line in messages.lines().filter(|line| line.contains("warning")) {
        println!("cargo:warning={line}");
    }
}
