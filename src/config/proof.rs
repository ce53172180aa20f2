//! What a stream's events prove: `hash`, and `[stream.sign]`.
//!
//! Source: README, «Trust in the data». Memory: what is returned. Errors: every one.
//! Not here: how it is proved (`codec::proof`).

use super::Problem;
use super::meaning::Check;
use super::walk::Section;
use crate::codec::proof::{Proof, Signer, SignerError};

const KEY_ID: &str = "stream.sign.key_id";
const SECRET: &str = "stream.sign.secret";

impl Check<'_> {
    /// What the events of a stream prove.
    pub(super) fn proof(&mut self, stream: &Section) -> Proof {
        Proof { hash: stream.boolean("stream.hash"), signer: self.signer(stream) }
    }

    fn signer(&mut self, stream: &Section) -> Option<Signer> {
        let line = stream.line_of_table("stream.sign")?;
        for key in [KEY_ID, SECRET] {
            if !stream.is_written(key) {
                self.error(line, Problem::Missing { key });
            }
        }
        let (key_id, secret) = (stream.text(KEY_ID)?, stream.secret(SECRET)?);
        let error = match Signer::new(&key_id, secret) {
            Ok(signer) => return Some(signer),
            Err(error) => error,
        };
        let key = match error {
            SignerError::KeyId => KEY_ID,
            SignerError::ShortSecret { .. } => SECRET,
        };
        self.error(stream.line_of(key), Problem::Signer { key, error });
        None
    }
}
