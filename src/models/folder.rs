//! Whether a name is that of a model folder, and what it is otherwise.

use std::path::Path;

use crate::error::{Error, Result};

/// Checks that a model folder is there.
///
/// # Errors
/// [`Error::ModelFolder`], with the way to a folder where the name looks like one of a hub.
pub fn check(folder: &Path) -> Result<()> {
    if folder.is_dir() {
        return Ok(());
    }
    let error = |reason: String| Err(Error::ModelFolder { path: folder.to_path_buf(), reason });
    if folder.exists() {
        return error("this is a file; name the folder that it is in".into());
    }
    match folder.to_str().filter(|name| is_hub_name(name)) {
        Some(name) => error(format!(
            "there is no such folder, and Sidereal downloads nothing; if this is a model of a hub, \
             fetch it by `hf download {name} --local-dir DIR` and name DIR"
        )),
        None => error("there is no such model folder".into()),
    }
}

/// Whether a name is of the form `owner/model`.
fn is_hub_name(name: &str) -> bool {
    let is_part = |part: &str| {
        !part.is_empty()
            && !part.starts_with('.')
            && part.chars().all(|c| c.is_ascii_alphanumeric() || "-_.".contains(c))
    };
    name.split_once('/').is_some_and(|(owner, model)| is_part(owner) && is_part(model))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_hub_name_is_told_so() {
        for (name, is_hub) in [
            ("Qwen/Qwen3-0.6B", true),
            ("models/missing/deeper", false),
            ("./missing", false),
            ("/missing", false),
            ("missing", false),
        ] {
            let error = check(Path::new(name)).expect_err("no such folder").to_string();
            assert_eq!(error.contains("hf download"), is_hub, "{error}");
        }
        assert!(
            check(Path::new("Cargo.toml")).is_err_and(|error| error.to_string().contains("file"))
        );
        assert!(check(Path::new("src")).is_ok());
    }
}
