//! Single values of the configuration as text: durations, sizes, secrets, addresses, header fields, origins.
//!
//! Source: protocol version 1, section 7; RFC 9110 section 5 for header fields; RFC 6454 section 6 for origins.
//! Memory: what is returned. Errors: [`FormError`], the operator's fault; never holds a secret.
//! Not here: TOML (`walk`), which key has which form (`keys`), where environment and files are (`Sources`).

use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use base64::Engine as _;
use base64::alphabet::{STANDARD, URL_SAFE};
use base64::engine::{DecodePaddingMode, GeneralPurpose, GeneralPurposeConfig};
use ipnet::IpNet;

use super::{FileError, Sources};
use crate::secret::Secret;
use crate::stream::live::Source;

/// Bytes of a secret that stands in a file.
pub(super) const SECRET_FILE_BYTES_MAX: usize = 64 << 10;
/// Bytes of a text that an error repeats.
const SHOWN_CHARS_MAX: usize = 64;

/// Why a value is not of its key's form.
#[derive(Clone, Debug, Eq, PartialEq, thiserror::Error)]
pub enum FormError {
    /// Not a number and a unit.
    #[error("{found} is not a duration: write a whole number and ms, s, m, h or d, as in \"250ms\" or \"5s\"")]
    Duration {
        /// The text, shortened.
        found: String,
    },
    /// Not a number and a unit, nor a number.
    #[error("{found} is not a size: write a whole number and KiB, MiB or GiB, as in \"64KiB\", or an integer of bytes")]
    Size {
        /// The text, shortened.
        found: String,
    },
    /// Outside the key's bounds.
    #[error("must be {bounds}")]
    OutOfBounds {
        /// The bounds, as in `from 0 to 10`.
        bounds: String,
    },
    /// None of the choices.
    #[error("{found} is not known here: write {choices}")]
    Choice {
        /// The text, shortened.
        found: String,
        /// What is known.
        choices: String,
    },
    /// Not an address and a port.
    #[error("{found} is not an address: write IP:PORT, as in \"127.0.0.1:8080\" or \"[::1]:8080\"")]
    Address {
        /// The text, shortened.
        found: String,
    },
    /// Not a network.
    #[error("{found} is not a network: write ADDRESS/BITS, as in \"10.0.0.0/8\"")]
    Network {
        /// The text, shortened.
        found: String,
    },
    /// Not an origin.
    #[error("{found} is not an origin: write scheme://host or scheme://host:port in lower case, without a path")]
    Origin {
        /// The text, shortened.
        found: String,
    },
    /// An origin that browsers spell otherwise.
    #[error("browsers write this origin as \"{serialized}\"")]
    OriginSpelling {
        /// The spelling of RFC 6454 section 6.2.
        serialized: String,
    },
    /// Not a moment.
    #[error("{found} is not a moment: write date, time and offset, as in 2027-01-01T00:00:00Z")]
    Moment {
        /// What is written.
        found: String,
    },
    /// `*`.
    #[error("\"*\" would let every site in with its visitors' cookies: list the origins")]
    OriginWildcard,
    /// No text at all.
    #[error("is empty")]
    Empty,
    /// More than the bound.
    #[error("is over {limit} bytes")]
    TooLong {
        /// Bytes that are allowed.
        limit: usize,
    },
    /// More members than the bound.
    #[error("has over {limit} members")]
    TooMany {
        /// How many are allowed.
        limit: usize,
    },
    /// `env:NAME` without that variable.
    #[error("the environment variable {name} is not set")]
    EnvMissing {
        /// Its name.
        name: String,
    },
    /// A file that cannot be read.
    #[error("the file {path} {error}")]
    File {
        /// Its path.
        path: String,
        /// Why not.
        error: FileError,
    },
    /// Not base64.
    #[error("what follows b64: is not base64")]
    Base64,
    /// Not hexadecimal.
    #[error("what follows hex: is not an even number of hexadecimal digits")]
    Hex,
}

/// `text` in quotes, fit for an error: shortened, control characters escaped.
pub(super) fn quoted(text: &str) -> String {
    let mut shown: String = text.chars().take(SHOWN_CHARS_MAX).collect();
    if shown.len() < text.len() {
        shown.push('…');
    }
    format!("{shown:?}")
}

/// A whole number and `ms`, `s`, `m`, `h` or `d`.
pub(super) fn duration(text: &str) -> Result<Duration, FormError> {
    let not_one = || FormError::Duration { found: quoted(text) };
    let (number, unit) = number_and_unit(text).ok_or_else(not_one)?;
    let ms_per_unit: u64 = match unit {
        "ms" => 1,
        "s" => 1000,
        "m" => 60 * 1000,
        "h" => 60 * 60 * 1000,
        "d" => 24 * 60 * 60 * 1000,
        _ => return Err(not_one()),
    };
    // Past every bound, and so refused as out of bounds.
    Ok(Duration::from_millis(number.saturating_mul(ms_per_unit)))
}

/// A whole number and `KiB`, `MiB` or `GiB`, in bytes.
pub(super) fn size(text: &str) -> Result<u64, FormError> {
    let not_one = || FormError::Size { found: quoted(text) };
    let (number, unit) = number_and_unit(text).ok_or_else(not_one)?;
    let bytes_per_unit: u64 = match unit {
        "KiB" => 1 << 10,
        "MiB" => 1 << 20,
        "GiB" => 1 << 30,
        _ => return Err(not_one()),
    };
    Ok(number.saturating_mul(bytes_per_unit))
}

/// Digits and what follows them; a number past `u64` becomes the greatest, which is past every bound.
fn number_and_unit(text: &str) -> Option<(u64, &str)> {
    let (digits, unit) = text.split_at_checked(text.bytes().take_while(u8::is_ascii_digit).count())?;
    (!digits.is_empty()).then(|| (digits.parse().unwrap_or(u64::MAX), unit))
}

/// `IP:PORT`; `localhost` is the loopback address of IPv4.
pub(super) fn address(text: &str) -> Result<SocketAddr, FormError> {
    let numeric = text.strip_prefix("localhost:").map(|port| format!("127.0.0.1:{port}"));
    numeric.as_deref().unwrap_or(text).parse().map_err(|_| FormError::Address { found: quoted(text) })
}

/// `ADDRESS/BITS`, or an address alone.
pub(super) fn network(text: &str) -> Result<IpNet, FormError> {
    let net = text.parse::<IpNet>().ok().or_else(|| text.parse::<IpAddr>().ok().map(IpNet::from));
    net.map(|net| net.trunc()).ok_or_else(|| FormError::Network { found: quoted(text) })
}

/// A secret, and where it stands.
#[derive(Clone, Debug)]
pub(super) struct Sourced {
    pub(super) secret: Secret,
    pub(super) source: Source,
}

/// As [`secret`], with where it was found.
pub(super) fn sourced(text: &str, sources: &dyn Sources) -> Result<Sourced, FormError> {
    let source = match (text.strip_prefix("env:"), text.strip_prefix("file:")) {
        (Some(name), _) => Source::Variable(name.to_owned()),
        (None, Some(path)) => Source::File(path.to_owned()),
        (None, None) => Source::Written,
    };
    Ok(Sourced { secret: secret(text, sources)?, source })
}

/// A secret as written: itself, or where it is to be found.
pub(super) fn secret(text: &str, sources: &dyn Sources) -> Result<Secret, FormError> {
    let secret = if let Some(name) = text.strip_prefix("env:") {
        Secret::new(sources.env(name).ok_or_else(|| FormError::EnvMissing { name: quoted(name) })?)
    } else if let Some(path) = text.strip_prefix("file:") {
        let read = sources.file(path, SECRET_FILE_BYTES_MAX);
        Secret::of_file(read.map_err(|error| FormError::File { path: quoted(path), error })?)
    } else if let Some(digits) = text.strip_prefix("b64:") {
        let config = GeneralPurposeConfig::new().with_decode_padding_mode(DecodePaddingMode::Indifferent);
        let engine = |alphabet| GeneralPurpose::new(alphabet, config).decode(digits);
        Secret::new(engine(&STANDARD).or_else(|_| engine(&URL_SAFE)).map_err(|_| FormError::Base64)?)
    } else if let Some(digits) = text.strip_prefix("hex:") {
        Secret::new(hex(digits).ok_or(FormError::Hex)?)
    } else {
        Secret::new(text)
    };
    if secret.is_empty() {
        return Err(FormError::Empty);
    }
    Ok(secret)
}

fn hex(digits: &str) -> Option<Vec<u8>> {
    let nibbles: Option<Vec<u8>> =
        digits.chars().map(|c| c.to_digit(16).and_then(|nibble| u8::try_from(nibble).ok())).collect();
    let nibbles = nibbles.filter(|nibbles| nibbles.len().is_multiple_of(2))?;
    Some(nibbles.chunks_exact(2).filter_map(|pair| Some(pair.first()? << 4 | pair.last()?)).collect())
}

/// `scheme://host[:port]` as `Origin` writes it.
pub(super) fn origin(text: &str) -> Result<String, FormError> {
    if text == "*" {
        return Err(FormError::OriginWildcard);
    }
    let not_one = || FormError::Origin { found: quoted(text) };
    let (scheme, rest) = text.split_once("://").ok_or_else(not_one)?;
    let is_scheme = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b"+-.".contains(&b);
    let is_host = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b"-._:[]".contains(&b);
    let scheme_fits = scheme.starts_with(|c: char| c.is_ascii_lowercase()) && scheme.bytes().all(is_scheme);
    if matches!(scheme.to_ascii_lowercase().as_str(), "http" | "https") {
        let url = url::Url::parse(text).map_err(|_| not_one())?;
        let bare = url.path() == "/" && url.query().is_none() && url.fragment().is_none() && !text.contains('@');
        let serialized = url.origin().ascii_serialization();
        return match bare {
            false => Err(not_one()),
            true if serialized == text => Ok(serialized),
            true => Err(FormError::OriginSpelling { serialized }),
        };
    }
    // Web views and extensions have schemes of their own: `capacitor://localhost`.
    let fits = scheme_fits && !rest.is_empty() && rest.bytes().all(is_host);
    fits.then(|| text.to_owned()).ok_or_else(not_one)
}

/// RFC 9110 section 5.6.2.
pub(super) fn is_token(text: &str) -> bool {
    let is_tchar = |b: u8| b.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(&b);
    !text.is_empty() && text.bytes().all(is_tchar)
}

/// RFC 9110 section 5.5: visible characters with spaces and tabs between them.
pub(super) fn is_field_value(bytes: &[u8]) -> bool {
    let blank = |b: Option<&u8>| matches!(b, Some(b' ' | b'\t'));
    let fits = |b: &u8| *b == b'\t' || (*b >= 0x20 && *b != 0x7f);
    bytes.iter().all(fits) && !blank(bytes.first()) && !blank(bytes.last())
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Fixed;

    impl Sources for Fixed {
        fn env(&self, name: &str) -> Option<Vec<u8>> {
            match name {
                "KEY" => Some(b"from env".to_vec()),
                "EMPTY" => Some(vec![]),
                _ => None,
            }
        }

        fn file(&self, path: &str, bytes_max: usize) -> Result<Vec<u8>, FileError> {
            match path {
                "unix" => Ok(b"from file\n".to_vec()),
                "dos" => Ok(b"from file\r\n".to_vec()),
                "two" => Ok(b"from file\n\n".to_vec()),
                "big" => Err(FileError::TooLarge { limit: bytes_max }),
                _ => Err(FileError::Missing),
            }
        }
    }

    #[test]
    fn durations_have_a_whole_number_and_a_unit() {
        for (text, ms) in
            [("250ms", 250), ("5s", 5000), ("10m", 600_000), ("1h", 3_600_000), ("30d", 2_592_000_000), ("0s", 0)]
        {
            assert_eq!(duration(text), Ok(Duration::from_millis(ms)), "{text}");
        }
        for bad in ["", "5", "s", "1.5s", "-1s", "+1s", "5 s", "5S", "5sec", "1h30m", "5µs"] {
            assert!(matches!(duration(bad), Err(FormError::Duration { .. })), "{bad}");
        }
        assert_eq!(duration("99999999999999999999999d"), Ok(Duration::from_millis(u64::MAX)));
    }

    #[test]
    fn sizes_have_a_whole_number_and_a_binary_unit() {
        for (text, bytes) in [("64KiB", 65_536), ("16MiB", 16 << 20), ("1GiB", 1 << 30), ("0KiB", 0)] {
            assert_eq!(size(text), Ok(bytes), "{text}");
        }
        for bad in ["", "64", "KiB", "64KB", "64K", "64kib", "-1KiB", "1.5MiB"] {
            assert!(matches!(size(bad), Err(FormError::Size { .. })), "{bad}");
        }
        assert_eq!(size("99999999999999999999999GiB"), Ok(u64::MAX));
    }

    #[test]
    fn secrets_come_from_where_they_say() {
        let read = |text| secret(text, &Fixed).map(|secret| secret.expose_secret().to_vec());
        for (text, bytes) in [
            ("plain", &b"plain"[..]),
            ("env:KEY", b"from env"),
            ("file:unix", b"from file"),
            ("file:dos", b"from file"),
            ("file:two", b"from file\n"),
            ("b64:AP8+", b"\0\xff>"),
            ("b64:AP8-", b"\0\xff>"),
            ("b64:AA", b"\0"),
            ("b64:AA==", b"\0"),
            ("hex:00fF", b"\0\xff"),
        ] {
            assert_eq!(read(text).as_deref(), Ok(bytes), "{text}");
        }
        for (text, error) in [
            ("", FormError::Empty),
            ("env:EMPTY", FormError::Empty),
            ("hex:", FormError::Empty),
            ("b64:", FormError::Empty),
            ("env:NOPE", FormError::EnvMissing { name: "\"NOPE\"".into() }),
            ("file:nope", FormError::File { path: "\"nope\"".into(), error: FileError::Missing }),
            ("file:big", FormError::File { path: "\"big\"".into(), error: FileError::TooLarge { limit: 65_536 } }),
            ("b64:!", FormError::Base64),
            ("b64:A", FormError::Base64),
            ("hex:0", FormError::Hex),
            ("hex:+1", FormError::Hex),
            ("hex:zz", FormError::Hex),
        ] {
            assert_eq!(read(text), Err(error), "{text}");
        }
    }

    #[test]
    fn origins_are_spelled_as_browsers_do() {
        for text in ["https://a.example", "http://a.example:8080", "http://[::1]:81", "capacitor://localhost"] {
            assert_eq!(origin(text).as_deref(), Ok(text));
        }
        for (text, serialized) in [
            ("https://A.example", "https://a.example"),
            ("https://a.example/", "https://a.example"),
            ("https://a.example:443", "https://a.example"),
            ("https://bücher.example", "https://xn--bcher-kva.example"),
        ] {
            assert_eq!(origin(text), Err(FormError::OriginSpelling { serialized: serialized.into() }), "{text}");
        }
        assert_eq!(origin("*"), Err(FormError::OriginWildcard));
        for bad in [
            "",
            "null",
            "a.example",
            "https://",
            "https://a/b",
            "https://a?b",
            "https://u@a",
            "x://",
            "X://a",
            "x://a/b",
        ] {
            assert!(matches!(origin(bad), Err(FormError::Origin { .. })), "{bad}");
        }
    }

    #[test]
    fn addresses_and_networks_are_numeric() {
        assert_eq!(address("localhost:0"), Ok(SocketAddr::from(([127, 0, 0, 1], 0))));
        assert!(address("[::1]:8080").is_ok());
        for bad in ["", "127.0.0.1", "127.0.0.1:65536", ":80", "example.com:80", "localhost:", "::1:80:"] {
            assert!(matches!(address(bad), Err(FormError::Address { .. })), "{bad}");
        }
        assert_eq!(network("10.1.2.3/8").map(|net| net.to_string()).as_deref(), Ok("10.0.0.0/8"));
        assert_eq!(network("::1").map(|net| net.to_string()).as_deref(), Ok("::1/128"));
        for bad in ["", "10.0.0.0/33", "proxy", "10.0.0/8"] {
            assert!(matches!(network(bad), Err(FormError::Network { .. })), "{bad}");
        }
    }

    #[test]
    fn header_fields_are_framed_by_no_value() {
        assert!(is_token("X-Api-Key") && !is_token("") && !is_token("a b") && !is_token("a:") && !is_token("é"));
        for good in ["", "a b\tc", "é"] {
            assert!(is_field_value(good.as_bytes()), "{good:?}");
        }
        for bad in [" a", "a ", "a\tb\t", "a\r\nb", "a\0", "\x7f"] {
            assert!(!is_field_value(bad.as_bytes()), "{bad:?}");
        }
    }

    #[test]
    fn long_texts_are_shortened_in_errors() {
        assert_eq!(quoted("a\n"), "\"a\\n\"");
        assert_eq!(quoted(&"é".repeat(64)).chars().count(), 66);
        assert_eq!(quoted(&"é".repeat(65)).chars().count(), 67);
    }
}
