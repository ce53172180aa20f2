//! `[[stream.view]]`: who gets what of a stream's value.
//!
//! Source: protocol version 1, section 3 («Sequences»); RFC 6901, RFC 9535. Memory: what is returned. Errors: every one.
//! Not here: what a view leaves of a value (`stream::view`).

use super::form::FormError;
use super::meaning::Check;
use super::walk::Section;
use super::{Oddity, Problem};
use crate::codec::jsonpath::JsonPath;
use crate::codec::pointer::Pointer;
use crate::limits::{VIEW_POINTERS_MAX, VIEWS_MAX};
use crate::stream::view::{Places, Projection, View};

impl Check<'_> {
    /// The views of a stream, in the order of the file; those with an error are left out.
    pub(super) fn views(&mut self, stream: &Section) -> Vec<View> {
        let sections = stream.array("stream.view");
        if let Some(section) = sections.get(VIEWS_MAX) {
            self.error(section.line, Problem::TooManyViews { limit: VIEWS_MAX });
        }
        sections.iter().take(VIEWS_MAX).filter_map(|section| self.view(section)).collect()
    }

    fn view(&mut self, section: &Section) -> Option<View> {
        let roles: Vec<String> = section.texts("stream.view.roles").into_iter().map(|role| role.value).collect();
        if roles.is_empty() && section.is_right("stream.view.roles") {
            self.error(section.line_of("stream.view.roles"), Problem::ViewWithoutRoles);
        }
        let (by_pointers, by_path) =
            (section.is_written("stream.view.pointers"), section.is_written("stream.view.path"));
        if by_pointers == by_path {
            self.error(section.line, Problem::ViewShape);
            return None;
        }
        let projection = if by_pointers { self.pointers(section)? } else { self.path(section)? };
        Some(View { roles, projection })
    }

    fn pointers(&mut self, section: &Section) -> Option<Projection> {
        let key = "stream.view.pointers";
        if !section.is_right(key) {
            return None;
        }
        let texts = section.texts(key);
        if texts.is_empty() || texts.len() > VIEW_POINTERS_MAX {
            let error =
                if texts.is_empty() { FormError::Empty } else { FormError::TooMany { limit: VIEW_POINTERS_MAX } };
            self.error(section.line_of(key), Problem::Form { key: key.to_owned(), error });
            return None;
        }
        let mut pointers = Vec::with_capacity(texts.len());
        for text in texts {
            match Pointer::parse(&text.value) {
                Ok(pointer) => pointers.push(pointer),
                Err(_) => self.error(text.line, Problem::ViewPointer),
            }
        }
        Some(Projection::Pointers(Places::new(pointers)))
    }

    fn path(&mut self, section: &Section) -> Option<Projection> {
        let text = section.text("stream.view.path")?;
        let error = |error| Problem::ViewPath(error);
        let parsed = JsonPath::parse(&text).map_err(|e| self.error(section.line_of("stream.view.path"), error(e)));
        parsed.ok().map(Projection::Path)
    }

    /// Warns of views that nobody gets.
    pub(super) fn warn_of_views(&mut self, stream: &Section, views: &[View], id: &str) {
        let sections = stream.array("stream.view");
        // Where some were left out, they are errors, and warnings are not shown.
        for (at, (section, view)) in sections.iter().zip(views).enumerate() {
            let earlier = || views.iter().take(at).flat_map(|view| &view.roles);
            if view.roles.iter().all(|role| earlier().any(|other| other == role)) {
                self.warn(section.line, Oddity::ViewUnreachable { id: id.to_owned() });
            }
        }
    }
}
