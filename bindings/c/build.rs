//! Gives the shared library the name by which programs look for it: a new number with each change of
//! the ABI that old programs cannot bear.

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    if std::env::var("CARGO_CFG_TARGET_OS").is_ok_and(|os| os == "linux") {
        println!("cargo:rustc-cdylib-link-arg=-Wl,-soname,libsidereal.so.0");
    }
}
