//! `Link` fields: where the next page is.
//!
//! Source: RFC 8288 sections 3 and B.2 (parsing is lenient as there: what follows a fault in one field is not read).
//! Memory: none; the target borrows from the field. Errors: none, what cannot be read is no link.
//! Not here: resolving the target, and whether it may be asked (`runtime::fetch::pages`).

use crate::limits::LINKS_MAX;

/// The target of the first link with the relation `next` in the values of `Link`, a URI reference as it was written. A link
/// with an `anchor` is about another resource than the one that was asked for, and is passed over (RFC 8288 section 3.2).
pub fn next<'a>(fields: impl Iterator<Item = &'a [u8]>) -> Option<&'a str> {
    let mut left = LINKS_MAX;
    for field in fields {
        let mut reader = Reader { rest: field };
        while left > 0 {
            left -= 1;
            match reader.link() {
                Some(Link { target, is_next: true, anchored: false }) => return std::str::from_utf8(target).ok(),
                Some(_) => {}
                None => break,
            }
        }
    }
    None
}

struct Link<'a> {
    target: &'a [u8],
    is_next: bool,
    anchored: bool,
}

struct Reader<'a> {
    rest: &'a [u8],
}

impl<'a> Reader<'a> {
    fn skip(&mut self, what: impl Fn(u8) -> bool) {
        while let Some((&byte, rest)) = self.rest.split_first()
            && what(byte)
        {
            self.rest = rest;
        }
    }

    fn eat(&mut self, byte: u8) -> bool {
        let rest = self.rest.split_first().filter(|(first, _)| **first == byte).map(|(_, rest)| rest);
        self.rest = rest.unwrap_or(self.rest);
        rest.is_some()
    }

    fn until(&mut self, ends: impl Fn(u8) -> bool) -> &'a [u8] {
        let end = self.rest.iter().position(|&byte| ends(byte)).unwrap_or(self.rest.len());
        let (part, rest) = self.rest.split_at(end);
        self.rest = rest;
        part
    }

    /// The next link, its separator behind it; `None`: there is none that can be read.
    fn link(&mut self) -> Option<Link<'a>> {
        // RFC 9110 section 5.6.1.2: empty elements of a list count for nothing.
        self.skip(|byte| is_space(byte) || byte == b',');
        if !self.eat(b'<') {
            return None;
        }
        let target = self.until(|byte| byte == b'>');
        if !self.eat(b'>') {
            return None;
        }
        let (mut relation, mut anchored) = (None, false);
        loop {
            self.skip(is_space);
            if !self.eat(b';') {
                break;
            }
            self.skip(|byte| is_space(byte) || byte == b';');
            let name = self.until(|byte| is_space(byte) || b"=;,".contains(&byte));
            self.skip(is_space);
            let value = if self.eat(b'=') {
                self.skip(is_space);
                self.value()?
            } else {
                b""
            };
            if name.eq_ignore_ascii_case(b"rel") {
                // RFC 8288 section 3.3: the first counts, later ones do not.
                relation = relation.or(Some(value));
            }
            anchored |= name.eq_ignore_ascii_case(b"anchor");
        }
        let mut types = relation.unwrap_or_default().split(|&byte| is_space(byte));
        Some(Link { target, is_next: types.any(|name| name.eq_ignore_ascii_case(b"next")), anchored })
    }

    /// A parameter's value, without its quotes. One with escapes is given as it stands: no relation has any.
    fn value(&mut self) -> Option<&'a [u8]> {
        if !self.eat(b'"') {
            return Some(self.until(|byte| is_space(byte) || byte == b';' || byte == b','));
        }
        let mut escaped = false;
        let end = self.rest.iter().position(|&byte| {
            let ends = byte == b'"' && !escaped;
            escaped = byte == b'\\' && !escaped;
            ends
        })?;
        let value = self.rest.get(..end)?;
        self.rest = self.rest.get(end + 1..)?;
        Some(value)
    }
}

fn is_space(byte: u8) -> bool {
    byte == b' ' || byte == b'\t'
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn next_of<'a>(fields: &[&'a str]) -> Option<&'a str> {
        next(fields.iter().map(|field| field.as_bytes()))
    }

    #[test]
    fn the_next_page_is_found_however_it_is_written() {
        for (fields, found) in [
            (&["<https://api.example/leads?page=2>; rel=\"next\""][..], Some("https://api.example/leads?page=2")),
            (&["</leads?page=2>;rel=next"], Some("/leads?page=2")),
            (&["<?page=2> ; REL = \"Next\""], Some("?page=2")),
            (&["</p1>; rel=\"prev\", </p3>; rel=\"next\", </p9>; rel=\"last\""], Some("/p3")),
            (&["</p1>; rel=\"prev\"", "</p3>; rel=\"next\""], Some("/p3")),
            (&["</p3>; rel=\"last next\""], Some("/p3")),
            (&["</p3>; rel=\"last\tnext\""], Some("/p3")),
            (&[" , ,</p3>;title=\"a, b; c\";rel=next"], Some("/p3")),
            (&["</p3>; title=\"a \\\" <b>, \"; rel=next"], Some("/p3")),
            (&["</a,b;c>; rel=next"], Some("/a,b;c")),
            (&["<>; rel=next"], Some("")),
            (&["</p3>;; rel=next;"], Some("/p3")),
            (&["</p3>; foo; rel=next"], Some("/p3")),
            (&["</p3>; rel=next; rel=prev"], Some("/p3")),
            (&["</p3>; rel=prev; rel=next"], None),
            (&["</p3>; rel*=UTF-8''next"], None),
            (&["</p3>; rel=nextish"], None),
            (&["</p3>; rel=\"next-archive\""], None),
            (&["</p3>; rev=next"], None),
            (&["</p3>; anchor=\"/other\"; rel=next, </p4>; rel=next"], Some("/p4")),
            (&["</p3>"], None),
            (&["/p3; rel=next"], None),
            (&["</p3; rel=next"], None),
            (&["</p2>; title=\"open; rel=next"], None),
            (&["</p1>; rel=prev bogus </p3>; rel=next"], None),
            (&[""], None),
            (&[], None),
        ] {
            assert_eq!(next_of(fields), found, "{fields:?}");
        }
    }

    #[test]
    fn a_target_that_is_no_text_is_no_page() {
        assert_eq!(next([&b"<\xff>; rel=next"[..]].into_iter()), None);
    }

    #[test]
    fn links_have_a_bound() {
        let many = |others: usize| format!("{}</n>; rel=next", "</o>; rel=other, ".repeat(others));
        assert_eq!(next_of(&[&many(LINKS_MAX - 1)]), Some("/n"));
        assert_eq!(next_of(&[&many(LINKS_MAX)]), None);
    }

    proptest! {
        #[test]
        fn whatever_is_sent_is_read_to_an_end(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            let _ = next([&*bytes].into_iter());
        }

        #[test]
        fn what_is_written_is_found(
            target in "[!#-;=?-~]{0,40}",
            title in "[ -!#-\\[\\]-~]{0,20}",
            before in prop::collection::vec("[a-z]{1,8}", 0..4),
        ) {
            let mut field: String = before.iter().map(|name| format!("</x>; rel=\"{name}s\", ")).collect();
            field.push_str(&format!("<{target}>; title=\"{title}\"; rel=\"prefetch next\""));
            prop_assert_eq!(next_of(&[&field]), Some(&*target));
        }
    }
}
