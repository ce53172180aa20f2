//! The only source of chance of a world: a seed, or bytes that somebody else has chosen and then a seed.

use std::collections::VecDeque;

/// SplitMix64, after the bytes it was given.
#[derive(Clone, Debug)]
pub struct Dice {
    state: u64,
    given: VecDeque<u8>,
}

impl Dice {
    pub fn seeded(seed: u64) -> Dice {
        Dice { state: seed, given: VecDeque::new() }
    }

    fn next(&mut self) -> u64 {
        self.state = self.state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.state;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    pub fn below(&mut self, bound: u64) -> u64 {
        let bound = bound.max(1);
        match (self.given.pop_front(), self.given.pop_front()) {
            // A small change of the bytes is a small change of what is drawn.
            (Some(high), Some(low)) => (u64::from(u16::from_be_bytes([high, low])) * bound) >> 16,
            _ => self.next() % bound,
        }
    }

    /// True `of` times in a hundred.
    pub fn percent(&mut self, of: u64) -> bool {
        self.below(100) < of
    }

    pub fn pick<'a, T>(&mut self, all: &'a [T]) -> &'a T {
        let place = self.below(all.len() as u64) as usize;
        &all[place]
    }
}

/// Two bytes are one throw.
impl From<&[u8]> for Dice {
    fn from(given: &[u8]) -> Dice {
        Dice { state: given.len() as u64, given: given.iter().copied().collect() }
    }
}
