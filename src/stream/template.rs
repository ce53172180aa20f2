//! Placeholders in an upstream's URL and body. (being built)

/// A URL with `{claims.NAME}` and `{query.NAME}`.
#[derive(Clone, Debug)]
pub struct UrlTemplate {}
/// A JSON body with the same.
#[derive(Clone, Debug)]
pub struct BodyTemplate {}
