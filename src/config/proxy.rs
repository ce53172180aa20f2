//! `[proxy]`: which way requests to upstreams leave.
//!
//! Source: README, «Configuration». Memory: what is returned. Errors: each at its own line.
//! Not here: what it means (`stream::proxy`).

use std::sync::Arc;

use super::Problem;
use super::form::Sourced;
use super::meaning::Check;
use super::walk::Section;
use crate::stream::proxy::{Exception, Proxy};

impl Check<'_> {
    /// `[proxy]`, where the file has it.
    pub(super) fn proxy(&mut self, root: &Section) -> Option<Arc<Proxy>> {
        let line = root.line_of_table("proxy")?;
        if !root.is_written("proxy.url") {
            self.error(line, Problem::Missing { key: "proxy.url" });
        }
        let at = root.line_of("proxy.url");
        let proxy = root.sourced("proxy.url").and_then(|Sourced { secret, source }| {
            Proxy::read(&secret, source).map_err(|error| self.error(at, Problem::ProxyUrl(error))).ok()
        });
        let mut except = Vec::new();
        for text in root.texts("proxy.except") {
            match Exception::parse(&text.value) {
                Some(exception) => except.push(exception),
                None => self.error(text.line, Problem::ProxyException { found: super::form::quoted(&text.value) }),
            }
        }
        Some(Arc::new(Proxy { except, ..proxy? }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{Config, FileError, Sources};
    use crate::stream::live::Source;
    use crate::stream::proxy::ProxyUrlError;

    struct One;

    impl Sources for One {
        fn env(&self, name: &str) -> Option<Vec<u8>> {
            (name == "PROXY").then(|| b"http://ada:hunter2@proxy.example:3128".to_vec())
        }

        fn file(&self, _: &str, _: usize) -> Result<Vec<u8>, FileError> {
            Err(FileError::Missing)
        }
    }

    fn read(lines: &str) -> Result<Config, Vec<String>> {
        let config = Config::parse(lines, &One);
        config
            .map(|(config, _)| config)
            .map_err(|errors| errors.iter().map(|error| error.problem.to_string()).collect())
    }

    #[test]
    fn a_proxy_is_read_and_shown_without_its_password() {
        assert!(read("").expect("it is right").proxy.is_none());
        let config =
            read("[proxy]\nurl = \"env:PROXY\"\nexcept = [\"10.0.0.0/8\", \"*.corp.example\"]").expect("it is right");
        let proxy = config.proxy.as_ref().expect("it is there");
        assert_eq!((proxy.port, proxy.except.len(), proxy.login.is_some()), (3128, 2, true));
        assert_eq!(proxy.source, Source::Variable("PROXY".into()));
        let shown = config.masked_toml();
        assert!(!shown.contains("hunter2"), "{shown}");
        let again = read(&shown).expect("what is shown is a configuration").proxy.expect("it is there");
        assert_eq!((&again.host, again.port, &again.except), (&proxy.host, proxy.port, &proxy.except));
    }

    #[test]
    fn what_is_wrong_is_named() {
        for (lines, problem) in [
            ("[proxy]\nexcept = []", Problem::Missing { key: "proxy.url" }),
            ("[proxy]\nurl = \"https://hunter2\"", Problem::ProxyUrl(ProxyUrlError::Scheme)),
            (
                "[proxy]\nurl = \"http://p\"\nexcept = [\"a b\"]",
                Problem::ProxyException { found: super::super::form::quoted("a b") },
            ),
        ] {
            assert_eq!(read(lines).expect_err(lines), [problem.to_string()], "{lines}");
        }
    }
}
