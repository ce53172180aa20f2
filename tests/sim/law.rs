//! What is said of users, tokens and sessions from outside, and what that means for who may see what: the model's own
//! reading of protocol version 1, sections 2 and 6. Nothing of the server's stands here.

use std::collections::BTreeSet;

/// How late the server may act after a core has heard something, or a credential has ended (protocol section 5).
pub const LATE_US: u64 = 250_000;
const SECOND_US: u64 = 1_000_000;

/// Streams that demand something: any one of the roles, all of the permissions.
pub const TEAM_ROLES: [&str; 2] = ["agent", "admin"];
pub const VAULT_PERMISSIONS: [&str; 2] = ["read", "list"];
/// Who may describe streams: any one of them.
pub const DIRECT_ROLES: [&str; 2] = ["viewer", "agent"];
/// What the action demands.
pub const ACTION_PERMISSION: &str = "write";

/// What somebody may do.
#[derive(Clone, Debug, Default, Eq, Ord, PartialEq, PartialOrd)]
pub struct Rights {
    pub roles: Vec<String>,
    pub permissions: Vec<String>,
}

impl Rights {
    pub fn of(roles: &[&str], permissions: &[&str]) -> Rights {
        let texts = |list: &[&str]| list.iter().map(|&text| text.to_owned()).collect();
        Rights { roles: texts(roles), permissions: texts(permissions) }
    }

    /// Whether of `roled` they see a part: agents do, whoever else may see it sees all.
    pub fn sees_part(&self) -> bool {
        self.roles.iter().any(|own| own == "agent")
    }

    /// Whether they reach the stream of that name.
    pub fn reach(&self, name: &str) -> bool {
        match name {
            "team" => TEAM_ROLES.iter().any(|role| self.roles.iter().any(|own| own == role)),
            "roled" => self.sees_part() || self.roles.iter().any(|own| own == "admin"),
            described if described.starts_with("direct#") => {
                DIRECT_ROLES.iter().any(|role| self.roles.iter().any(|own| own == role))
            }
            "vault" => VAULT_PERMISSIONS.iter().all(|wanted| self.permissions.iter().any(|own| own == wanted)),
            _ => true,
        }
    }
}

/// Whom something is said of: a user of one issuer, or of all.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct User {
    pub issuer: Option<&'static str>,
    pub sub: String,
}

/// What is said.
#[derive(Clone, Debug)]
pub enum What {
    LoggedOut(User),
    SessionLoggedOut {
        sid: String,
    },
    Revoked {
        issuer: Option<&'static str>,
        jti: String,
        exp_s: Option<u64>,
    },
    IssuedBefore {
        user: User,
        before_s: u64,
    },
    Rights {
        user: User,
        roles: Option<Vec<String>>,
        permissions: Option<Vec<String>>,
    },
    /// An API key, by its place in the book, is no more.
    KeyDeleted {
        key: usize,
    },
}

/// Something that was said. From then on its mark stands.
#[derive(Clone, Debug)]
pub struct Saying {
    pub what: What,
    /// Its date, on the wall clock.
    pub at_us: u64,
    /// How many things had been said when it was said first: it may be said again.
    pub first_said: usize,
    /// When each core has heard of it.
    pub heard: Vec<Option<Heard>>,
}

/// When something was heard: on the monotonic clock, and as the how manieth of all that was heard.
#[derive(Clone, Copy, Debug)]
pub struct Heard {
    pub at_us: u64,
    no: u64,
}

/// A credential that a client has brought.
#[derive(Clone, Debug)]
pub struct Token {
    /// Which message brought it; 0: the request.
    pub id: u64,
    /// `exp`, in microseconds; a session's: never, for its record says.
    pub exp_us: u64,
    pub company: u64,
    pub rights: Rights,
    /// `iat`, in seconds.
    pub iat_s: Option<u64>,
    pub jti: Option<String>,
    /// The session that it is.
    pub session: Option<String>,
    /// The API key that it is, by its place in the book.
    pub key: Option<usize>,
    /// Whether it has ended at some time, even if the clock was set back since.
    pub has_ended: bool,
    /// How many things had been said when it was sent.
    pub sent_after: usize,
    /// When that was, on the wall clock.
    pub sent_wall_us: u64,
}

/// All that was said.
#[derive(Debug, Default)]
pub struct Law {
    pub said: Vec<Saying>,
    /// By how much the wall clock was set back, in all.
    pub set_back_us: u64,
    /// How much was heard, by all cores together.
    pub heard: u64,
}

/// A client's connection, as far as the law asks.
#[derive(Clone, Copy, Debug)]
pub struct Party<'a> {
    pub issuer: Option<&'static str>,
    pub sub: &'a str,
    /// Whether it asks for values, and is not told whose credential that is.
    pub only_asks: bool,
    pub core: usize,
    /// How many things had been said when it was welcomed.
    pub welcomed_after: Option<usize>,
    /// When what is judged began, on the monotonic clock, by how much the wall clock was ahead, and how much had been heard
    /// then.
    pub at_us: u64,
    pub offset_us: u64,
    pub heard: u64,
}

impl Party<'_> {
    pub fn is(&self, user: &User) -> bool {
        user.sub == self.sub && (user.issuer.is_none() || user.issuer == self.issuer)
    }
}

impl Saying {
    /// When the core of `party` has heard of it, if it had then.
    fn heard_by(&self, party: Party<'_>) -> Option<u64> {
        self.heard[party.core].filter(|heard| heard.no <= party.heard).map(|heard| heard.at_us)
    }

    /// The word by which it ends a token, whoever presents it and whenever.
    fn refuses(&self, party: Party<'_>, token: &Token) -> Option<&'static str> {
        match &self.what {
            What::SessionLoggedOut { sid } => (token.session.as_ref() == Some(sid)).then_some("logged_out"),
            _ if token.session.is_some() || token.key.is_some() => None,
            What::LoggedOut(user) => {
                let earlier = token.iat_s.is_none_or(|iat_s| iat_s <= self.at_us / SECOND_US);
                (party.is(user) && earlier).then_some("logged_out")
            }
            What::Revoked { issuer, jti, .. } => {
                let of_issuer = issuer.is_none() || *issuer == party.issuer;
                (of_issuer && token.jti.as_ref() == Some(jti)).then_some("token_revoked")
            }
            What::IssuedBefore { user, before_s } => {
                let earlier = token.iat_s.is_none_or(|iat_s| iat_s < *before_s);
                (party.is(user) && earlier).then_some("token_revoked")
            }
            What::Rights { .. } | What::KeyDeleted { .. } => None,
        }
    }

    /// The word by which it must end a connection under that token.
    fn ends(&self, party: Party<'_>, token: &Token) -> Option<&'static str> {
        match &self.what {
            // What a session may do afterwards its record says; what there was when it was said ends.
            What::LoggedOut(user) if token.session.is_some() => {
                let was_there = party.welcomed_after.is_some_and(|before| before <= self.first_said);
                (party.is(user) && was_there).then_some("logged_out")
            }
            // Each core has its own table of them, which counts from when it has heard of it.
            What::KeyDeleted { key } => (token.key == Some(*key)).then_some("api_key_revoked"),
            _ => self.refuses(party, token),
        }
    }

    /// The word by which it may end a connection under that token; `set_back_us`: by how much the clock was.
    fn may_end(&self, party: Party<'_>, token: &Token, set_back_us: u64) -> Option<&'static str> {
        match &self.what {
            What::LoggedOut(user) if token.session.is_some() => {
                // What is heard again is dated by a clock that may have been set back since.
                let certainly_us = self.at_us + SECOND_US + set_back_us;
                let later = token.sent_after > self.first_said && token.sent_wall_us > certainly_us;
                (party.is(user) && !later).then_some("logged_out")
            }
            What::KeyDeleted { .. } => self.ends(party, token),
            _ => self.refuses(party, token),
        }
    }
}

impl Law {
    /// Whether a mark stood against that token already when it was sent.
    pub fn refuses(&self, party: Party<'_>, token: &Token) -> bool {
        self.said[..token.sent_after].iter().any(|saying| saying.refuses(party, token).is_some())
    }

    /// Since when a connection that is under one of these tokens, it is not known which, must have ended.
    pub fn ended_at(&self, party: Party<'_>, tokens: &[Token]) -> Option<u64> {
        if self.said.is_empty() {
            return None;
        }
        let ended = |token: &Token| {
            let heard = self.said.iter().filter(|saying| saying.ends(party, token).is_some());
            heard.filter_map(|saying| saying.heard_by(party)).min()
        };
        tokens.iter().map(ended).try_fold(0, |latest, at| Some(latest.max(at?)))
    }

    /// Whether it may be ended, or refused, for that reason.
    pub fn may_end(&self, party: Party<'_>, tokens: &[Token], reason: &str) -> bool {
        tokens
            .iter()
            .any(|token| self.said.iter().any(|saying| saying.may_end(party, token, self.set_back_us) == Some(reason)))
    }

    /// Whether it may be refused at all.
    pub fn may_refuse(&self, party: Party<'_>, tokens: &[Token]) -> bool {
        ["logged_out", "token_revoked", "api_key_revoked"].iter().any(|reason| self.may_end(party, tokens, reason))
    }

    /// Whether what was said last is about somebody: it ends their credential, or changes its rights.
    pub fn is_about(&self, party: Party<'_>, token: &Token) -> bool {
        self.said.last().is_some_and(|saying| match &saying.what {
            What::Rights { user, .. } => token.key.is_none() && party.is(user),
            _ => saying.ends(party, token).is_some(),
        })
    }

    /// Whether that API key has been deleted, as far as `core` has heard; or at all.
    pub fn has_deleted(&self, deleted: usize, core: Option<usize>) -> bool {
        self.said.iter().any(|saying| match saying.what {
            What::KeyDeleted { key } => key == deleted && core.is_none_or(|core| saying.heard[core].is_some()),
            _ => false,
        })
    }

    /// A core hears of something that was said.
    pub fn hear(&mut self, place: usize, core: usize, at_us: u64) {
        self.heard += 1;
        let heard = Heard { at_us, no: self.heard };
        self.said[place].heard[core].get_or_insert(heard);
    }

    /// Each of the rights that a token may give a connection. What its core has heard of holds for certain, and so does what
    /// was said before the token was sent. `ever`: what was told of them earlier and read late counts too.
    pub fn rights(&self, party: Party<'_>, token: &Token, ever: bool) -> BTreeSet<Rights> {
        let changes = |saying: &&Saying| match &saying.what {
            What::Rights { user, .. } => {
                let earlier = token.iat_s.is_none_or(|iat_s| iat_s <= saying.at_us / SECOND_US);
                token.key.is_none() && party.is(user) && earlier
            }
            _ => false,
        };
        let certain =
            |place: usize, saying: &Saying| place < token.sent_after || (!ever && saying.heard_by(party).is_some());
        let all: Vec<(bool, &Saying)> = self
            .said
            .iter()
            .enumerate()
            .filter(|(_, saying)| changes(saying))
            .map(|(place, saying)| (certain(place, saying), saying))
            .collect();
        let open = all.iter().filter(|(certain, _)| !certain).count().min(8);
        (0..1_u32 << open)
            .map(|chosen| {
                let mut choice = chosen;
                let (mut roles, mut permissions) = ((0, &token.rights.roles), (0, &token.rights.permissions));
                for (certain, saying) in &all {
                    let holds = *certain || {
                        let holds = choice & 1 == 1;
                        choice >>= 1;
                        holds
                    };
                    let What::Rights { roles: new_roles, permissions: new_permissions, .. } = &saying.what else {
                        continue;
                    };
                    if let Some(new) = new_roles.as_ref().filter(|_| holds && saying.at_us >= roles.0) {
                        roles = (saying.at_us, new);
                    }
                    if let Some(new) = new_permissions.as_ref().filter(|_| holds && saying.at_us >= permissions.0) {
                        permissions = (saying.at_us, new);
                    }
                }
                Rights { roles: roles.1.clone(), permissions: permissions.1.clone() }
            })
            .collect()
    }

    /// What was said that may be about somebody, for whoever reads of a failure.
    pub fn shown(&self, party: Party<'_>) -> String {
        let about = |saying: &&Saying| match &saying.what {
            What::LoggedOut(user) | What::IssuedBefore { user, .. } | What::Rights { user, .. } => party.is(user),
            What::SessionLoggedOut { .. } | What::Revoked { .. } | What::KeyDeleted { .. } => true,
        };
        let shown =
            |saying: &Saying| format!("{:?} of {}, {:?}; ", saying.what, saying.at_us, saying.heard[party.core]);
        self.said.iter().filter(about).map(shown).collect()
    }

    /// Whether anything was said of that user's rights.
    pub fn changes_rights_of(&self, party: Party<'_>) -> bool {
        self.said.iter().any(|saying| matches!(&saying.what, What::Rights { user, .. } if party.is(user)))
    }

    /// Whether that core has heard of everything by then.
    pub fn is_heard(&self, core: usize, by_us: u64) -> bool {
        self.said.iter().all(|saying| saying.heard[core].is_some_and(|heard| heard.at_us <= by_us))
    }
}
