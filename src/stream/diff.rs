//! What changed between two values. (being built)

/// A JSON pointer (RFC 6901).
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Pointer {}
