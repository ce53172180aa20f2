//! A table whose places are used again: small numbers for things that come and go.
//!
//! Memory: one entry a place, as many places as were ever held at once. Errors: none; a place is looked up, not assumed.

/// A table of `T`, each at a place that stays its own until it is removed.
#[derive(Debug)]
pub(super) struct Slab<T> {
    places: Vec<Option<T>>,
    free: Vec<u32>,
}

impl<T> Default for Slab<T> {
    fn default() -> Slab<T> {
        Slab { places: Vec::new(), free: Vec::new() }
    }
}

impl<T> Slab<T> {
    /// Puts `item` at a free place and tells which.
    pub(super) fn insert(&mut self, item: T) -> u32 {
        match self.free.pop() {
            Some(index) => {
                self.places[index as usize] = Some(item);
                index
            }
            None => {
                let index = u32::try_from(self.places.len()).expect("descriptors bound connections far below 2^32");
                self.places.push(Some(item));
                index
            }
        }
    }

    /// Takes out what stands at `index`.
    pub(super) fn remove(&mut self, index: u32) -> Option<T> {
        let item = self.places.get_mut(index as usize)?.take()?;
        self.free.push(index);
        Some(item)
    }

    /// What stands at `index`.
    pub(super) fn at(&self, index: u32) -> Option<&T> {
        self.places.get(index as usize)?.as_ref()
    }

    /// What stands at `index`, to be changed.
    pub(super) fn at_mut(&mut self, index: u32) -> Option<&mut T> {
        self.places.get_mut(index as usize)?.as_mut()
    }

    /// How many places there are, taken or not: every index is below it.
    pub(super) fn places(&self) -> u32 {
        u32::try_from(self.places.len()).unwrap_or(u32::MAX)
    }

    /// How many places are taken.
    pub(super) fn len(&self) -> usize {
        self.places.len() - self.free.len()
    }

    /// Whether none is.
    pub(super) fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// All that is there, with its place.
    pub(super) fn iter(&self) -> impl Iterator<Item = (u32, &T)> {
        self.places.iter().enumerate().filter_map(|(i, item)| Some((u32::try_from(i).ok()?, item.as_ref()?)))
    }
}

#[cfg(test)]
mod tests {
    use super::Slab;

    #[test]
    fn places_are_used_again() {
        let mut slab = Slab::default();
        let (a, b) = (slab.insert("a"), slab.insert("b"));
        assert_eq!(slab.remove(a), Some("a"));
        assert_eq!(slab.remove(a), None, "a place is emptied once");
        assert_eq!(slab.insert("c"), a);
        assert_eq!((slab.at(a), slab.at(b), slab.len(), slab.places()), (Some(&"c"), Some(&"b"), 2, 2));
    }
}
