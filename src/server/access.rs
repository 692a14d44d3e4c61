//! Who may call what.

use axum::http::StatusCode;
use subtle::ConstantTimeEq;

use super::error::{Failure, Outcome};

/// What a call does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Scope {
    /// It reads: recommendations, descriptions of models and catalogs.
    Read,
    /// It changes catalogs, weights or models.
    Write,
}

/// The tokens of a server. Health, readiness and metrics ask for none.
pub(super) struct Access {
    pub read_token: Option<String>,
    pub write_token: Option<String>,
    /// Whether other machines can reach the server.
    pub is_exposed: bool,
}

impl Access {
    /// Lets a call pass, or says why not. `authorization` is the header as it came.
    pub fn check(&self, authorization: Option<&[u8]>, scope: Scope) -> Outcome<()> {
        let given = authorization.and_then(bearer);
        let is = |token: &Option<String>| {
            let token = token.as_deref().map(str::as_bytes);
            // Both are looked at in full, whether they are equal or not.
            token.zip(given).is_some_and(|(token, given)| token.ct_eq(given).into())
        };
        let (is_reader, is_writer) = (is(&self.read_token), is(&self.write_token));
        match scope {
            Scope::Read if self.read_token.is_none() || is_reader || is_writer => Ok(()),
            Scope::Write if is_writer => Ok(()),
            Scope::Write if self.write_token.is_none() && !self.is_exposed => {
                // A reader's token is no permission to write, on no machine.
                match self.read_token.is_none() {
                    true => Ok(()),
                    false => Err(forbidden()),
                }
            }
            Scope::Write if self.write_token.is_none() => Err(forbidden()),
            Scope::Write if is_reader => Err(Failure::new(
                StatusCode::FORBIDDEN,
                "forbidden",
                "this call needs the write token, the one given is for reading",
            )),
            _ => Err(Failure::new(
                StatusCode::UNAUTHORIZED,
                "unauthorized",
                "this call needs a token: send the header \"Authorization: Bearer TOKEN\"",
            )),
        }
    }
}

fn forbidden() -> Failure {
    Failure::new(
        StatusCode::FORBIDDEN,
        "forbidden",
        "changes need a write token, and the server has none; start it with --write-token-file",
    )
}

/// The token of a header `Bearer TOKEN`, whose first word is read in any case.
fn bearer(header: &[u8]) -> Option<&[u8]> {
    let (scheme, token) = header.split_at_checked(7)?;
    scheme.eq_ignore_ascii_case(b"bearer ").then(|| token.trim_ascii())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn status(access: &Access, header: Option<&str>, scope: Scope) -> u16 {
        let outcome = access.check(header.map(str::as_bytes), scope);
        outcome.map_or_else(|failure| failure.status.as_u16(), |()| 200)
    }

    #[test]
    fn each_token_opens_what_it_is_for() {
        let access = Access {
            read_token: Some("reader".into()),
            write_token: Some("writer".into()),
            is_exposed: true,
        };
        for (header, read, write) in [
            (None, 401, 401),
            (Some("Bearer reader"), 200, 403),
            (Some("bearer  reader "), 200, 403),
            (Some("Bearer writer"), 200, 200),
            (Some("Bearer readers"), 401, 401),
            (Some("Bearer "), 401, 401),
            (Some("Basic reader"), 401, 401),
            (Some("reader"), 401, 401),
        ] {
            assert_eq!(status(&access, header, Scope::Read), read, "{header:?}");
            assert_eq!(status(&access, header, Scope::Write), write, "{header:?}");
        }
    }

    #[test]
    fn without_a_write_token_only_a_local_server_takes_changes() {
        let open = |read_token: Option<&str>, is_exposed| Access {
            read_token: read_token.map(str::to_string),
            write_token: None,
            is_exposed,
        };
        assert_eq!(status(&open(None, false), None, Scope::Write), 200);
        assert_eq!(status(&open(None, true), None, Scope::Write), 403);
        assert_eq!(status(&open(None, true), None, Scope::Read), 200);
        assert_eq!(status(&open(Some("reader"), false), Some("Bearer reader"), Scope::Write), 403);
    }
}
