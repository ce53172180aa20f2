//! How the work that callers' `select`s may take of one value is shared among them; of a stream with views, among those of
//! each view by what that shows, so that nobody learns anything of the rest by what they are refused.
//!
//! Source: our own. Memory: a claim for each `select`; what each payer has spent, while a value is looked at.
//! Errors: none; who gets too little is [`Cost::Refused`]. Not here: what a step of work is (`stream::select`), who watches
//! (`shard::owner`).
//!
//! There are two occasions. **A new value** ([`Shares::among`]) is looked at for all of them: each that is watched has a small
//! share that nobody can take, those that take little come before those that take much, whatever is watched before what is
//! not, and no payer gets more than a part. What a `select` takes is known from the value before; where it is not, it is
//! tried with little first and with four times as much then, so that a cheap one is found before a dear one has taken
//! what those who are known have left. **One who comes** to a value that is there ([`Shares::admit`]) gets what those who take more would have to
//! leave to it: the next value is shared so.

use std::collections::HashMap;
use std::sync::Arc;

use crate::ids::Holder;
use crate::limits::{
    SELECT_WORK_MIN, SELECT_WORK_PER_BYTE, SELECTS_CHEAP_PARTS, SELECTS_SUBJECT_PARTS, SELECTS_WORK_MAX,
    SELECTS_WORK_MIN, SELECTS_WORK_PER_BYTE,
};

/// How much more a `select` whose work is not known is tried with each time.
const TRY_FACTOR: u64 = 4;

/// What a `select` has taken of the last value that it was made of.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub enum Cost {
    /// It has not been tried.
    #[default]
    Unknown,
    /// So much.
    Taken(u64),
    /// More than this, which was all that there was for it, and which it has taken for nothing.
    Refused(u64),
}

/// One `select`, as those that share with it see it.
#[derive(Clone, Debug, Default)]
pub struct Claim {
    /// Whether somebody watches it, or it only lingers.
    pub watched: bool,
    /// Who answers for it: who watches, of each core one; those that it lingers for.
    pub payers: Arc<[Holder]>,
    /// What it took when it was last looked at.
    pub cost: Cost,
}

/// What evaluating one came to.
#[derive(Clone, Copy, Debug)]
pub struct Tried {
    /// What it took, be it for nothing.
    pub work: u64,
    /// Whether that was enough.
    pub fits: bool,
}

/// The work that there is for one value.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Shares {
    /// For all.
    pub total: u64,
    /// For one of them.
    pub each_max: u64,
    /// For each that is watched, whatever others take.
    pub cheap: u64,
    /// For all of one payer.
    pub payer_max: u64,
}

impl Cost {
    /// What it is after it was tried with so much. That it was refused more before is remembered: it is not tried with that
    /// again and again.
    fn then(self, tried: Tried, allowed: u64) -> Cost {
        match self {
            _ if tried.fits => Cost::Taken(tried.work),
            Cost::Refused(before) => Cost::Refused(before.max(allowed)),
            Cost::Unknown | Cost::Taken(_) => Cost::Refused(allowed),
        }
    }

    fn work(self) -> u64 {
        match self {
            Cost::Unknown => 0,
            Cost::Taken(work) | Cost::Refused(work) => work,
        }
    }
}

impl Shares {
    /// What there is for a value of so many bytes, of which so many `select`s are watched, where it is one of so many `views`
    /// of a stream, or all of it.
    pub fn of(bytes: usize, watched: usize, views: usize) -> Shares {
        let (bytes, watched) = (bytes as u64, watched as u64);
        let most = SELECTS_WORK_MAX / views.max(1) as u64;
        let total = SELECTS_WORK_MIN.max(bytes.saturating_mul(SELECTS_WORK_PER_BYTE)).min(most);
        Shares {
            total,
            each_max: SELECT_WORK_MIN.max(bytes.saturating_mul(SELECT_WORK_PER_BYTE)).min(total),
            // At least half of it is for those that take more, however many there are.
            cheap: total / SELECTS_CHEAP_PARTS.max(watched.saturating_mul(2)),
            payer_max: total / SELECTS_SUBJECT_PARTS,
        }
    }

    /// Shares it among `claims`, the oldest first. `evaluate` tries one of them with so much work at most.
    pub fn among(&self, claims: &[Claim], evaluate: impl FnMut(usize, u64) -> Tried) -> Vec<Cost> {
        let of = |watched: bool| (0..claims.len()).filter(move |&at| claims[at].watched == watched);
        let reserved = self.cheap.saturating_mul(of(true).count() as u64);
        let costs = claims.iter().map(|claim| claim.cost).collect();
        let (left, tried, spent) = (self.total, vec![false; claims.len()], Spent::default());
        let mut sharing = Sharing { shares: self, claims, costs, tried, spent, left, reserved, evaluate };
        sharing.serve(of(true).collect());
        sharing.serve(of(false).collect());
        sharing.costs
    }

    /// Gives those who come their part of a value that `others` are made of already, one after the other.
    pub fn admit(
        &self,
        others: &[Claim],
        newcomers: &[Claim],
        mut evaluate: impl FnMut(usize, u64) -> Tried,
    ) -> Vec<Cost> {
        let mut present = others.to_vec();
        for (at, claim) in newcomers.iter().enumerate() {
            let allowed = self.room(&present, claim);
            let cost = claim.cost.then(evaluate(at, allowed), allowed);
            present.push(Claim { cost, ..claim.clone() });
        }
        present.split_off(others.len()).into_iter().map(|claim| claim.cost).collect()
    }

    /// The most that `claim` may take beside `others`: what is left by those that are watched and take no more than that, and
    /// of what its payer may take what is left by all that cannot be taken back from it.
    pub fn room(&self, others: &[Claim], claim: &Claim) -> u64 {
        let own = if claim.watched { self.cheap } else { 0 };
        let works = others.iter().filter(|other| other.watched || !claim.watched);
        let in_all = level(self.total, works.filter_map(|other| taken(other.cost)).collect());
        let of_payer = |payer: &Holder| {
            let theirs = others.iter().filter(|other| other.payers.contains(payer));
            let (mut gone, mut watched) = (0_u64, Vec::new());
            for other in theirs {
                let part = other.cost.work().div_ceil(other.payers.len() as u64);
                match other.cost {
                    Cost::Taken(_) if other.watched => watched.push(part),
                    // What they have left, and what was tried for nothing, was spent on them all the same.
                    _ => gone = gone.saturating_add(part),
                }
            }
            level(self.payer_max.saturating_sub(gone), watched)
        };
        let of_payers = claim.payers.iter().map(of_payer).max().unwrap_or(self.total);
        in_all.min(of_payers).max(own).min(self.each_max)
    }
}

/// A value's work while it is shared out.
struct Sharing<'c, E> {
    shares: &'c Shares,
    claims: &'c [Claim],
    costs: Vec<Cost>,
    /// Who has had what nobody else can take.
    tried: Vec<bool>,
    spent: Spent,
    left: u64,
    /// What those are sure of that have not been tried.
    reserved: u64,
    evaluate: E,
}

impl<E: FnMut(usize, u64) -> Tried> Sharing<'_, E> {
    /// Lets those at these places take what they need, as far as it goes.
    fn serve(&mut self, places: Vec<usize>) {
        let Shares { each_max, cheap, .. } = *self.shares;
        let (mut known, mut others): (Vec<usize>, Vec<usize>) =
            places.into_iter().partition(|&at| matches!(self.costs[at], Cost::Taken(_)));
        known.sort_by_key(|&at| self.costs[at].work());
        for at in known {
            // It may have grown with the value; where by much, it waits until the others have theirs.
            let most = self.costs[at].work().saturating_mul(2).saturating_add(cheap).min(each_max);
            if self.try_with(at, most) && most < each_max {
                others.push(at);
            }
        }
        let mut most = cheap;
        while !others.is_empty() {
            let is_last = most >= each_max;
            let (mut now, later): (Vec<usize>, Vec<usize>) =
                others.into_iter().partition(|&at| is_last || self.costs[at].work() < most);
            others = later;
            now.sort_by_key(|&at| self.costs[at].work());
            for at in now {
                if self.try_with(at, most) && !is_last {
                    others.push(at);
                }
            }
            most = most.saturating_mul(TRY_FACTOR).min(each_max);
        }
    }

    /// Tries one with so much at most, and with no more than there is for it. Whether all of that was there, and it takes more.
    fn try_with(&mut self, at: usize, most: u64) -> bool {
        let Shares { cheap, payer_max, .. } = *self.shares;
        let claim = &self.claims[at];
        let mut own = 0;
        if claim.watched && !std::mem::replace(&mut self.tried[at], true) {
            self.reserved -= cheap;
            own = cheap;
        }
        let room = self.left.saturating_sub(self.reserved).min(self.spent.left(&claim.payers, payer_max).max(own));
        let allowed = room.min(most);
        let tried = (self.evaluate)(at, allowed);
        self.left = self.left.saturating_sub(tried.work);
        self.spent.add(&claim.payers, tried.work);
        self.costs[at] = self.costs[at].then(tried, allowed);
        !tried.fits && allowed == most
    }
}

fn taken(cost: Cost) -> Option<u64> {
    match cost {
        Cost::Taken(work) => Some(work),
        Cost::Unknown | Cost::Refused(_) => None,
    }
}

/// The most that one can take of `total` if those of `works` that take more than it have to leave.
fn level(total: u64, mut works: Vec<u64>) -> u64 {
    works.sort_unstable();
    let (mut left, mut level) = (total, 0);
    for work in works {
        // Less than this one, which then has to leave, as have all behind it.
        level = level.max(left.min(work.saturating_sub(1)));
        left = left.saturating_sub(work);
        if left < work {
            return level;
        }
    }
    level.max(left)
}

/// What payers have spent on one value.
#[derive(Debug, Default)]
struct Spent(HashMap<Holder, u64>);

impl Spent {
    /// What the one of `payers` who has spent least may spend; all, where there is none.
    fn left(&self, payers: &[Holder], most: u64) -> u64 {
        let left = |payer| most.saturating_sub(self.0.get(payer).copied().unwrap_or(0));
        payers.iter().map(left).max().unwrap_or(u64::MAX)
    }

    /// All of them share it.
    fn add(&mut self, payers: &[Holder], work: u64) {
        for payer in payers {
            let spent = self.0.entry(*payer).or_default();
            *spent = spent.saturating_add(work.div_ceil(payers.len() as u64));
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::limits::VIEWS_MAX;

    /// 16,384 bytes: 262,144 for all, 65,536 for one, 2,048 for whoever is cheap, 131,072 for a payer.
    const BYTES: usize = 16 << 10;

    fn claim(payer: u64, cost: Cost) -> Claim {
        Claim { watched: true, payers: Arc::from([Holder::from_hash(payer)]), cost }
    }

    fn shares(claims: &[Claim]) -> Shares {
        Shares::of(BYTES, claims.iter().filter(|claim| claim.watched).count(), 0)
    }

    /// Evaluates one that needs so much.
    fn tried(needs: u64, allowed: u64) -> Tried {
        Tried { work: needs.min(allowed), fits: needs <= allowed }
    }

    /// Those that fit, of those that need so much; what they and the others took together.
    fn among(claims: &[Claim], needs: &[u64]) -> (Vec<bool>, u64, Vec<Cost>) {
        let mut work = 0;
        let costs = shares(claims).among(claims, |at, allowed| {
            let outcome = tried(needs[at], allowed);
            work += outcome.work;
            outcome
        });
        (costs.iter().map(|cost| matches!(cost, Cost::Taken(_))).collect(), work, costs)
    }

    #[test]
    fn the_bounds_are_what_the_limits_say() {
        let shares = Shares::of(BYTES, 64, 0);
        assert_eq!(shares, Shares { total: 262_144, each_max: 65_536, cheap: 2_048, payer_max: 131_072 });
        assert_eq!(Shares::of(BYTES, 65, 1).cheap, 262_144 / 130, "half of it is for those that take more");
        assert_eq!(Shares::of(0, 0, 0).each_max, SELECT_WORK_MIN);
        assert_eq!(Shares::of(1 << 30, 0, 1).total, SELECTS_WORK_MAX);
        assert_eq!(Shares::of(1 << 30, 0, VIEWS_MAX).total, SELECTS_WORK_MAX / VIEWS_MAX as u64, "all views together");
    }

    #[test]
    fn cheap_ones_are_served_however_many_dear_ones_came_before_and_whoever_pays() {
        // Thirty payers with two dear ones each, whose work is not known yet, and behind them those who ask for little.
        let mut claims: Vec<Claim> = (0..60).map(|at| claim(at / 2, Cost::Unknown)).collect();
        let mut needs = vec![60_000; 60];
        claims.extend((0..4).map(|_| claim(99, Cost::Unknown)));
        needs.extend([10, 500, 2_048, 1]);
        let (fits, work, costs) = among(&claims, &needs);
        assert_eq!(fits[60..], [true; 4]);
        assert!(work <= 262_144);
        // With the next value too, in which they are dearer by a little.
        for (claim, cost) in claims.iter_mut().zip(costs) {
            claim.cost = cost;
        }
        needs[60] = 11;
        let (fits, work, _) = among(&claims, &needs);
        assert_eq!(fits[60..], [true; 4]);
        assert!(work <= 262_144 && fits[..60].iter().filter(|fits| **fits).count() <= 4);
    }

    #[test]
    fn the_dearest_lose_first_and_of_equals_the_newest() {
        let known = [(1, 65_000), (2, 60_000), (3, 64_000), (4, 60_000), (5, 20_000), (6, 60_000)];
        let claims: Vec<Claim> = known.iter().map(|&(payer, work)| claim(payer, Cost::Taken(work))).collect();
        let needs: Vec<u64> = known.iter().map(|&(_, work)| work).collect();
        assert_eq!(among(&claims, &needs).0, [false, true, false, true, true, true]);
        let equal: Vec<Claim> = (0..5).map(|payer| claim(payer, Cost::Taken(60_000))).collect();
        assert_eq!(among(&equal, &[60_000; 5]).0, [true, true, true, true, false]);
        // And who has lost loses again, so that nobody is served with every other value.
        let mut again = equal;
        again[4].cost = Cost::Refused(22_000);
        assert_eq!(among(&again, &[60_000; 5]).0, [true, true, true, true, false]);
    }

    #[test]
    fn a_payer_takes_its_part_and_no_more_and_what_is_left_is_anothers() {
        let mut claims: Vec<Claim> = (0..8).map(|_| claim(1, Cost::Taken(50_000))).collect();
        claims.push(claim(2, Cost::Taken(60_000)));
        let mut needs = vec![50_000; 8];
        needs.push(60_000);
        let (fits, ..) = among(&claims, &needs);
        assert_eq!(fits.iter().filter(|fits| **fits).count(), 3, "two of the one, and what the other wants: {fits:?}");
        assert!(fits[8]);
        // What two of them watch is paid by both.
        for claim in &mut claims[..4] {
            claim.payers = Arc::from([Holder::from_hash(1), Holder::from_hash(3)]);
        }
        assert_eq!(among(&claims, &needs).0[..8].iter().filter(|fits| **fits).count(), 4);
    }

    #[test]
    fn what_nobody_watches_takes_nothing_from_what_is_watched() {
        let lingering = |payer, work| Claim { watched: false, ..claim(payer, Cost::Taken(work)) };
        let mut claims: Vec<Claim> = (0..4).map(|payer| lingering(payer, 10_000)).collect();
        claims.extend((4..8).map(|payer| claim(payer, Cost::Taken(64_000))));
        let needs: Vec<u64> = claims.iter().map(|claim| claim.cost.work()).collect();
        let (fits, ..) = among(&claims, &needs);
        assert_eq!(fits, [false, false, false, false, true, true, true, true]);
        // Nor from one who comes.
        let newcomer = claim(9, Cost::Unknown);
        let full: Vec<Claim> = (0..4).map(|payer| lingering(payer, 65_536)).collect();
        assert_eq!(shares(&full).room(&full, &newcomer), 65_536);
        assert_eq!(shares(&full).room(&full, &Claim { watched: false, ..newcomer }), 65_535);
    }

    #[test]
    fn of_those_nothing_is_known_of_who_takes_less_is_found_before_all_is_spent() {
        let claims: Vec<Claim> = (0..13).map(|payer| claim(payer, Cost::Unknown)).collect();
        let mut needs = vec![60_000; 12];
        needs.push(6_000);
        let (fits, work, _) = among(&claims, &needs);
        assert!(fits[12] && work <= 262_144);
    }

    #[test]
    fn what_was_too_little_once_is_remembered_until_it_fits() {
        let outcome = tried(50, 20);
        assert_eq!(Cost::Refused(30).then(outcome, 20), Cost::Refused(30));
        assert_eq!(Cost::Refused(10).then(outcome, 20), Cost::Refused(20));
        assert_eq!(Cost::Taken(10).then(outcome, 20), Cost::Refused(20));
        assert_eq!(Cost::Refused(30).then(tried(20, 20), 20), Cost::Taken(20));
    }

    #[test]
    fn one_who_comes_gets_what_those_who_take_more_would_leave() {
        let dear: Vec<Claim> = (0..4).map(|payer| claim(payer, Cost::Taken(65_536))).collect();
        let room = |others: &[Claim], payer| shares(others).room(others, &claim(payer, Cost::Unknown));
        assert_eq!(room(&dear, 9), 65_535, "it may take less than they do, and then one of them has to leave");
        assert_eq!(room(&dear[..3], 9), 65_536);
        let many: Vec<Claim> = (0..100).map(|payer| claim(payer, Cost::Taken(2_600))).collect();
        assert_eq!(room(&many, 999), 2_599, "all of it is taken by such as that");
        // A payer's own, of which those that are watched can be taken back, and no others.
        let own: Vec<Claim> = (0..2).map(|_| claim(1, Cost::Taken(65_536))).collect();
        assert_eq!((room(&own, 1), room(&own, 2)), (65_535, 65_536));
        for spent in [Cost::Taken(65_536), Cost::Refused(65_536)] {
            let lingering: Vec<Claim> =
                own.iter().map(|one| Claim { watched: false, cost: spent, ..one.clone() }).collect();
            assert_eq!((room(&lingering, 1), room(&lingering, 2)), (2_048, 65_536));
        }
    }

    #[test]
    fn who_asks_for_much_again_and_again_is_refused_before_it_has_cost_more_than_its_part() {
        let mut present: Vec<Claim> = Vec::new();
        let mut work = 0;
        for _ in 0..64 {
            let newcomer = claim(1, Cost::Unknown);
            let cost = shares(&present).admit(&present, std::slice::from_ref(&newcomer), |_, allowed| {
                let outcome = tried(40_000, allowed);
                work += outcome.work;
                outcome
            })[0];
            // It has gone before the next one comes.
            present.push(Claim { watched: false, cost, ..newcomer });
        }
        assert!(work <= 131_072 + 64 * 2_048, "{work}");
        assert_eq!(present.iter().filter(|claim| matches!(claim.cost, Cost::Taken(_))).count(), 3);
    }

    proptest! {
        // However they come and whatever they need: no more is spent than there is, one payer spends its part and what is cheap,
        // and whoever is watched and cheap is served.
        #[test]
        fn no_more_is_spent_than_there_is_and_the_cheap_are_served(
            drawn in prop::collection::vec((0_u64..6, 0_u64..80_000, 0_u8..4, any::<bool>()), 0..90),
        ) {
            let claims: Vec<Claim> = drawn
                .iter()
                .map(|&(payer, needs, known, watched)| {
                    let cost = match known {
                        0 => Cost::Taken(needs),
                        1 => Cost::Taken(needs / 50),
                        2 => Cost::Refused(needs / 3),
                        _ => Cost::Unknown,
                    };
                    Claim { watched, ..claim(payer, cost) }
                })
                .collect();
            let shares = shares(&claims);
            let (mut work, mut of_payer) = (0, [0_u64; 6]);
            let costs = shares.among(&claims, |at, allowed| {
                let outcome = tried(drawn[at].1, allowed);
                work += outcome.work;
                of_payer[drawn[at].0 as usize] += outcome.work;
                outcome
            });
            prop_assert!(work <= shares.total, "{}", work);
            for (payer, spent) in of_payer.into_iter().enumerate() {
                let watched = drawn.iter().filter(|one| one.0 == payer as u64 && one.3).count() as u64;
                prop_assert!(spent <= shares.payer_max + watched * shares.cheap, "{}", spent);
            }
            for (cost, &(_, needs, _, watched)) in costs.iter().zip(&drawn) {
                prop_assert!(!watched || needs > shares.cheap || *cost == Cost::Taken(needs));
            }
        }
    }
}
