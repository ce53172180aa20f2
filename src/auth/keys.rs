//! The keys that verify tokens. (being built)

/// Keys by `kid` and algorithm.
#[derive(Clone, Debug, Default)]
pub struct KeySet {}
