//! What one connection gets: nearly always one stream, sometimes many.
//!
//! Memory: inline for one, a box for more; at most `limits.subscriptions_per_connection`, and never over
//! [`SLOTS_MAX`]. Errors: none; a slot is looked up, not assumed.

/// Subscriptions one connection can ever have, whatever the configuration says.
pub const SLOTS_MAX: usize = 4096;

/// Who has a place among the filled-in streams for a subscription.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Counted {
    /// Nobody needs one.
    Nobody,
    /// The subject.
    Subject,
    /// The client's address, whoever the connection has become since.
    Address,
}

/// One subscription, as its connection knows it.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Slot {
    /// The topic it is on.
    pub topic: u32,
    /// Where it stands among the rendition's readers.
    pub position: u32,
    /// The rendition: its kind's number.
    pub kind: u8,
    /// Whether it stands among the rated readers.
    pub rated: bool,
    /// Whether it waits for the topic to be attached, and stands among no readers yet.
    pub pending: bool,
    /// Whose streams count it.
    pub counted: Counted,
    /// Least time between two events; 0: none.
    pub max_rate_ms: u32,
}

/// The subscriptions of one connection.
#[derive(Debug, Default)]
pub enum Subscriptions {
    /// None, or none any more.
    #[default]
    None,
    /// One, in slot 0.
    One(Slot),
    /// Any number; a slot that was given up is `None` until it is taken again.
    Many(Box<Vec<Option<Slot>>>),
}

impl Subscriptions {
    /// What stands in `slot`.
    pub fn at(&self, slot: u16) -> Option<&Slot> {
        match self {
            Subscriptions::One(one) if slot == 0 => Some(one),
            Subscriptions::Many(many) => many.get(usize::from(slot))?.as_ref(),
            _ => None,
        }
    }

    /// What stands in `slot`, to be changed.
    pub fn at_mut(&mut self, slot: u16) -> Option<&mut Slot> {
        match self {
            Subscriptions::One(one) if slot == 0 => Some(one),
            Subscriptions::Many(many) => many.get_mut(usize::from(slot))?.as_mut(),
            _ => None,
        }
    }

    /// Puts a subscription in a free slot and tells which; `None` where all [`SLOTS_MAX`] are taken.
    pub fn insert(&mut self, new: Slot) -> Option<u16> {
        match self {
            Subscriptions::None => {
                *self = Subscriptions::One(new);
                Some(0)
            }
            Subscriptions::One(one) => {
                *self = Subscriptions::Many(Box::new(vec![Some(*one), Some(new)]));
                Some(1)
            }
            Subscriptions::Many(many) => {
                if let Some(free) = many.iter().position(Option::is_none) {
                    many[free] = Some(new);
                    return u16::try_from(free).ok();
                }
                if many.len() >= SLOTS_MAX {
                    return None;
                }
                many.push(Some(new));
                u16::try_from(many.len() - 1).ok()
            }
        }
    }

    /// Takes out what stands in `slot`.
    pub fn remove(&mut self, slot: u16) -> Option<Slot> {
        match self {
            Subscriptions::One(one) if slot == 0 => {
                let one = *one;
                *self = Subscriptions::None;
                Some(one)
            }
            Subscriptions::Many(many) => {
                let removed = many.get_mut(usize::from(slot))?.take();
                while many.last().is_some_and(Option::is_none) {
                    many.pop();
                }
                if many.is_empty() {
                    *self = Subscriptions::None;
                }
                removed
            }
            _ => None,
        }
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        match self {
            Subscriptions::None => 0,
            Subscriptions::One(_) => 1,
            Subscriptions::Many(many) => many.iter().flatten().count(),
        }
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// One past the highest slot taken.
    pub fn slots(&self) -> u16 {
        match self {
            Subscriptions::None => 0,
            Subscriptions::One(_) => 1,
            Subscriptions::Many(many) => u16::try_from(many.len()).unwrap_or(u16::MAX),
        }
    }

    /// All of them, with their slots.
    pub fn iter(&self) -> impl Iterator<Item = (u16, &Slot)> {
        (0..self.slots()).filter_map(|slot| Some((slot, self.at(slot)?)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn on(topic: u32) -> Slot {
        Slot { topic, position: 0, kind: 0, rated: false, pending: false, counted: Counted::Nobody, max_rate_ms: 0 }
    }

    #[test]
    fn slots_stay_while_others_come_and_go() {
        let mut all = Subscriptions::default();
        assert_eq!((all.insert(on(1)), all.insert(on(2)), all.insert(on(3))), (Some(0), Some(1), Some(2)));
        assert_eq!(all.remove(1), Some(on(2)));
        assert_eq!(all.remove(1), None);
        assert_eq!(all.iter().map(|(slot, on)| (slot, on.topic)).collect::<Vec<_>>(), [(0, 1), (2, 3)]);
        assert_eq!(all.insert(on(4)), Some(1), "a free slot is taken again");
        for slot in 0..3 {
            assert!(all.remove(slot).is_some());
        }
        assert!(all.is_empty() && matches!(all, Subscriptions::None));
    }

    #[test]
    fn there_is_a_last_slot() {
        let mut all = Subscriptions::default();
        for topic in 0..SLOTS_MAX {
            assert!(all.insert(on(u32::try_from(topic).unwrap())).is_some());
        }
        assert_eq!(all.insert(on(0)), None);
        assert_eq!(all.len(), SLOTS_MAX);
    }
}
