//! Random numbers that nobody outside can foresee, from one seed: ids, epochs, jitter.
//!
//! Memory: 72 bytes. Not here: where the seed comes from (the operating system; a number, in the simulator).

use ring::digest;

/// A generator: SHA-256 over the seed and a counter.
pub struct Rng {
    seed: [u8; 32],
    counter: u64,
}

impl std::fmt::Debug for Rng {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Rng(***)")
    }
}

impl Rng {
    /// The generator of that seed.
    pub fn new(seed: [u8; 32]) -> Rng {
        Rng { seed, counter: 0 }
    }

    /// A secret for that purpose alone. It takes nothing from the numbers that are drawn.
    pub fn secret(&self, purpose: &str) -> [u8; 32] {
        let mut context = digest::Context::new(&digest::SHA256);
        // Longer than what numbers are made of, so it is none of them.
        context.update(&self.seed);
        context.update(b"a secret for: ");
        context.update(purpose.as_bytes());
        *context.finish().as_ref().first_chunk().expect("SHA-256 has 32 bytes")
    }

    /// 128 random bits.
    pub fn u128(&mut self) -> u128 {
        let mut input = [0u8; 40];
        input[..32].copy_from_slice(&self.seed);
        input[32..].copy_from_slice(&self.counter.to_le_bytes());
        self.counter += 1;
        let hash = digest::digest(&digest::SHA256, &input);
        u128::from_le_bytes(*hash.as_ref().first_chunk().expect("SHA-256 has 32 bytes"))
    }

    /// 64 random bits.
    pub fn u64(&mut self) -> u64 {
        (self.u128() & u128::from(u64::MAX)) as u64
    }

    /// A number below `bound`; 0 where that is 0.
    pub fn below(&mut self, bound: u64) -> u64 {
        // The bias of a 128-bit remainder is far below what anyone could see.
        if bound == 0 { 0 } else { (self.u128() % u128::from(bound)) as u64 }
    }
}
