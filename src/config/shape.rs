//! `filter`: what a stream makes of its upstream's value before anything is compared.
//!
//! Source: README, «Shaping». Memory: what is returned. Errors: every one.
//! Not here: the program itself (`stream::filter`), where it is read (`Sources::filter`).

use super::Problem;
use super::meaning::Check;
use super::walk::Section;
use crate::limits::FILTER_BYTES_MAX;
use crate::stream::filter::{Filter, FilterError};

const FILTER: &str = "stream.filter";

impl Check<'_> {
    /// The filter of a stream.
    pub(super) fn filter(&mut self, stream: &Section) -> Option<Filter> {
        let text = stream.text(FILTER)?;
        let read = if text.len() > FILTER_BYTES_MAX { Err(FilterError::TooLong) } else { self.sources().filter(&text) };
        read.map_err(|error| self.error(stream.line_of(FILTER), Problem::Filter(error))).ok()?;
        Some(Filter::new(&text))
    }
}
