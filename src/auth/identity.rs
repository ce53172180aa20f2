//! What a process says in its own name, so that nobody else can: its name is the hash of a public key, and it signs.
//!
//! Processes share no secret that all of them surely have. So the name that each has drawn, which stands in the names of its
//! connections, vouches for itself: whoever knows it can tell whether that process has said a thing. To speak in its name
//! takes a key with the same 64 bits, 2^64 attempts, anew for each process and within its life.
//!
//! Source: RFC 8032 (Ed25519). Memory: a key pair. Errors: what is not signed by that process is not said by it.
//! Not here: how what is said travels (`runtime::redis`).

use ring::digest;
use ring::signature::{ED25519, Ed25519KeyPair, KeyPair, UnparsedPublicKey};

use crate::ids::ProcessId;

const PUBLIC_KEY_BYTES: usize = 32;

/// What a process may say in its own name.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Statement {
    /// It has nothing to answer: what that question of `asker`'s is about is not here.
    No {
        /// Who has asked.
        asker: ProcessId,
        /// The question's number.
        question: u64,
    },
    /// It is about to end.
    Bye,
}

impl Statement {
    fn bytes(self) -> Vec<u8> {
        let mut bytes = b"restcast: a process says, 1".to_vec();
        match self {
            Statement::No { asker, question } => {
                bytes.push(1);
                bytes.extend_from_slice(&asker.0.to_be_bytes());
                bytes.extend_from_slice(&question.to_be_bytes());
            }
            Statement::Bye => bytes.push(2),
        }
        bytes
    }
}

/// A process's name, and what it signs with.
pub struct Identity {
    pair: Ed25519KeyPair,
}

impl std::fmt::Debug for Identity {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Identity({})", self.process())
    }
}

impl Identity {
    /// The one of these random bits.
    pub fn of_random(seed: [u8; 32]) -> Identity {
        let pair = Ed25519KeyPair::from_seed_unchecked(&seed).expect("32 bytes are a seed (RFC 8032 5.1.5)");
        Identity { pair }
    }

    /// The name.
    pub fn process(&self) -> ProcessId {
        name_of(self.pair.public_key().as_ref())
    }

    /// That this process says so: its public key, and the signature.
    pub fn sign(&self, statement: Statement) -> Vec<u8> {
        let mut signed = self.pair.public_key().as_ref().to_vec();
        signed.extend_from_slice(self.pair.sign(&statement.bytes()).as_ref());
        signed
    }
}

/// Whether `signed` proves that this process has said so.
pub fn has_said(process: ProcessId, statement: Statement, signed: &[u8]) -> bool {
    let Some((key, signature)) = signed.split_first_chunk::<PUBLIC_KEY_BYTES>() else { return false };
    name_of(key) == process && UnparsedPublicKey::new(&ED25519, key).verify(&statement.bytes(), signature).is_ok()
}

fn name_of(public_key: &[u8]) -> ProcessId {
    ProcessId(first_bits(&[b"restcast: a process, 1", public_key]))
}

/// The number of a question: the hash of what is asked, so that an answer to it is one to nothing else. What is asked has a
/// salt, so no two questions have the same number, and who has not seen the question does not know it.
pub fn number_of(parts: &[&[u8]]) -> u64 {
    let mut all: Vec<&[u8]> = vec![b"restcast: a question, 1"];
    all.extend_from_slice(parts);
    first_bits(&all)
}

fn first_bits(parts: &[&[u8]]) -> u64 {
    let mut context = digest::Context::new(&digest::SHA256);
    parts.iter().for_each(|part| context.update(part));
    let hash = context.finish();
    u64::from_be_bytes(*hash.as_ref().first_chunk().expect("SHA-256 has more than 8 bytes"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_process_itself_says_a_thing_in_its_name_and_only_that() {
        let [own, other] = [1, 2].map(|seed| Identity::of_random([seed; 32]));
        assert_ne!(own.process(), other.process());
        let no = Statement::No { asker: ProcessId(7), question: 9 };
        let signed = own.sign(no);
        assert!(has_said(own.process(), no, &signed));
        assert!(!has_said(other.process(), no, &signed), "the key is another's");
        assert!(!has_said(own.process(), no, &other.sign(no)));
        let others = [
            Statement::No { asker: ProcessId(8), question: 9 },
            Statement::No { asker: ProcessId(7), question: 10 },
            Statement::Bye,
        ];
        for said in others {
            assert!(!has_said(own.process(), said, &signed), "{said:?}");
        }
        // Its key beside another's signature.
        let mut mixed = own.sign(no);
        mixed.truncate(PUBLIC_KEY_BYTES);
        mixed.extend_from_slice(other.sign(no).get(PUBLIC_KEY_BYTES..).expect("a signature"));
        assert!(!has_said(own.process(), no, &mixed));
        for at in 0..signed.len() {
            let mut changed = signed.clone();
            *changed.get_mut(at).expect("a byte") ^= 1;
            assert!(!has_said(own.process(), no, &changed), "byte {at}");
            assert!(!has_said(own.process(), no, signed.get(..at).expect("bytes")), "{at} bytes");
        }
    }

    #[test]
    fn a_question_has_the_number_of_what_it_asks() {
        let number = number_of(&[&[0, 3], &[0, 0, 0, 9], b"sealed"]);
        assert_eq!(number, number_of(&[&[0, 3], &[0, 0, 0, 9], b"sealed"]));
        for other in [
            [&[0, 4][..], &[0, 0, 0, 9], b"sealed"],
            [&[0, 3], &[0, 0, 0, 8], b"sealed"],
            [&[0, 3], &[0, 0, 0, 9], b"Sealed"],
        ] {
            assert_ne!(number, number_of(&other));
        }
    }
}
