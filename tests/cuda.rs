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
        // No driver, or one without a GPU.
        Err(error) => {
            assert_eq!(output.status.code(), Some(2), "{errors}");
            assert!(errors.contains(&error.to_string()), "{errors}, not {error}");
        }
    }
}

#[test]
#[cfg_attr(not(has_kernels), ignore = "built without nvcc")]
fn the_kernels_are_in_the_binary_for_each_architecture() {
    let binary = std::fs::read(env!("CARGO_BIN_EXE_sidereal")).expect("the binary of this build");
    let number = |at: usize| u32::from_le_bytes(binary[at..at + 4].try_into().expect("four"));
    // Magic number, version and header's size, bytes behind it.
    let magic = 0xba55_ed50u32.to_le_bytes();
    let start = binary.windows(4).position(|window| window == magic);
    let start = start.expect("a fat binary: was nvcc there?") + 16;
    let end = start + number(start - 8) as usize;
    let (mut at, mut found) = (start, Vec::new());
    while at < end {
        // Of each part: its kind in 16 bits, its header's bytes, its bytes, ..., its architecture.
        let kind = if number(at) & 0xffff == 1 { "PTX" } else { "code" };
        found.push((kind, number(at + 28)));
        at += (number(at + 4) + number(at + 8)) as usize;
    }
    found.sort_unstable();
    assert_eq!(found, [("PTX", 90), ("code", 80), ("code", 90)]);
}
