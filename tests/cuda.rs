//! The feature `cuda` where there may be no GPU.

use std::process::Command;

use sidereal::backend::cuda::num_devices;

/// A GPU or a clear word about its absence.
#[test]
fn the_command_line_says_what_is_missing_for_a_gpu() {
    let output = Command::new(env!("CARGO_BIN_EXE_sidereal"))
        .args(["selftest", "--device", "cuda:0", "--cases", "2", "--no-bench"])
        .output()
        .expect("the binary of this build");
    let errors = String::from_utf8_lossy(&output.stderr);
    match num_devices() {
        Ok(1..) => assert!(output.status.success(), "{errors}"),
        Ok(_) => assert!(errors.contains("there are 0 GPUs"), "{errors}"),
        Err(error) => {
            assert_eq!(output.status.code(), Some(2), "{errors}");
            assert!(error.to_string().contains("no NVIDIA driver is installed"), "{error}");
            assert!(errors.contains("no NVIDIA driver is installed"), "{errors}");
        }
    }
}

#[test]
fn the_kernels_are_in_the_binary_for_each_architecture() {
    let binary = std::fs::read(env!("CARGO_BIN_EXE_sidereal")).expect("the binary of this build");
    let has = |text: &str| binary.windows(text.len()).any(|window| window == text.as_bytes());
    // Names of kernels are in the code for every architecture, which fat binaries may compress;
    // the fat binary itself begins with its magic number.
    let magic = 0xba55_ed50u32.to_le_bytes();
    assert!(binary.windows(4).any(|window| window == magic), "no fat binary: was nvcc there?");
    assert!(has("attend_beams_bf16_128"), "the backend knows its kernels");
}
