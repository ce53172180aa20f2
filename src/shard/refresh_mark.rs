//! By what processes tell each other which filled-in stream is meant.
//!
//! Source: ours. A mark is a hash of what is asked of the upstream: equal in two processes exactly where they would send the
//! same request, whatever their own hashes are seeded with. So nothing of a user's claims has to be said; whoever has guessed
//! a whole request can tell that it was meant. Memory: none. Errors: none. Not here: who tells whom (`refresh`).

use ring::digest;

use crate::ids::StreamId;

/// Bytes of a mark.
pub const MARK_BYTES: usize = 16;

/// Tells what is polled from all else that is, in every process alike.
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub struct RefreshMark([u8; MARK_BYTES]);

impl From<[u8; MARK_BYTES]> for RefreshMark {
    fn from(bytes: [u8; MARK_BYTES]) -> RefreshMark {
        RefreshMark(bytes)
    }
}

impl AsRef<[u8]> for RefreshMark {
    fn as_ref(&self) -> &[u8] {
        &self.0
    }
}

impl RefreshMark {
    /// The mark of what is asked for a stream of that name. What lets the request in is no part of it: one process may have
    /// been given a new secret before another.
    pub(super) fn of(name: &str, method: &str, url: &str, body: Option<&[u8]>) -> RefreshMark {
        let mut context = digest::Context::new(&digest::SHA256);
        context.update(b"restcast: a filled-in stream, 1");
        let has_body = if body.is_some() { b"+" } else { b"-" };
        let parts = [name.as_bytes(), method.as_bytes(), url.as_bytes(), has_body, body.unwrap_or_default()];
        for part in parts {
            // With its length, so that no part goes over into the next.
            context.update(&(part.len() as u64).to_le_bytes());
            context.update(part);
        }
        let hash = context.finish();
        RefreshMark(*hash.as_ref().first_chunk().expect("SHA-256 has 32 bytes"))
    }
}

/// A filled-in stream that is to be polled.
#[derive(Clone, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub struct Refreshed {
    /// Of which stream.
    pub id: StreamId,
    /// As what it was filled in.
    pub mark: RefreshMark,
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;
    use std::sync::Arc;

    use super::*;
    use crate::auth::grant::Grant;
    use crate::shard::Catalog;
    use crate::stream;
    use crate::stream::template::UrlTemplate;

    fn mark(catalog: &Catalog, id: &str) -> RefreshMark {
        let anonymous = Grant::anonymous(&mut Default::default());
        let id = StreamId::new(id).expect("an id");
        catalog.selected(&anonymous, &id).expect("it is there").mark()
    }

    fn stream(id: &str, url: &str) -> Arc<stream::Options> {
        let url = UrlTemplate::parse::<&str>(url, &[]).expect("a URL");
        Arc::new(stream::Options::new(StreamId::new(id).expect("an id"), url))
    }

    #[test]
    fn processes_that_know_nothing_of_each_other_give_the_same_request_the_same_mark() {
        let (a, b) = (stream("a", "http://h.example/x?k=1"), stream("b", "http://h.example/x?k=1"));
        let one = Catalog::new(&[Arc::clone(&a)], None, 7);
        let two = Catalog::new(&[Arc::clone(&b)], None, 8);
        let two = Catalog::new(&[a, b], Some(&two), 9);
        assert_eq!(mark(&one, "a"), mark(&two, "a"));
        assert_ne!(mark(&two, "a"), mark(&two, "b"));
        let other = Catalog::new(&[stream("a", "http://h.example/x?k=2")], None, 7);
        assert_ne!(mark(&one, "a"), mark(&other, "a"));
    }

    #[test]
    fn each_part_of_a_request_counts_and_none_goes_over_into_the_next() {
        let all = [
            RefreshMark::of("ab", "GET", "u", None),
            RefreshMark::of("a", "bGET", "u", None),
            RefreshMark::of("a", "GET", "u", None),
            RefreshMark::of("a", "POST", "u", None),
            RefreshMark::of("a", "GET", "v", None),
            RefreshMark::of("a", "GET", "u", Some(b"")),
            RefreshMark::of("a", "GET", "u", Some(b"+")),
            RefreshMark::of("a", "GET", "u", Some(b"-")),
        ];
        let different: HashSet<RefreshMark> = all.into_iter().collect();
        assert_eq!(different.len(), all.len());
        assert_eq!(RefreshMark::of("a", "GET", "u", Some(b"x")), RefreshMark::of("a", "GET", "u", Some(b"x")));
    }
}
