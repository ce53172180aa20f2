//! Whether each connection got each event once and in order, judged by sequence numbers alone, and whether it ended when it
//! was to end.
//!
//! Source: protocol version 1, section 3: `seq` grows by one, a delta builds on the event before it, a snapshot may jump
//! forward; section 5 for the ends. Memory: 48 bytes for each stream of a connection. Errors: none.

use crate::payload::Event;

/// One stream as one connection has seen it.
#[derive(Clone, Debug)]
pub struct Subscription {
    /// Number of the stream's name.
    pub stream: u32,
    /// Number of the sequence it is in.
    pub sequence: u32,
    /// The newest event that came.
    pub seq: u64,
    /// Bit k: event `seq - k` came.
    came: u64,
    /// Bit k: event `seq - k` was counted as lost.
    missing: u64,
}

/// What an event was to its connection.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Verdict {
    /// The first of its stream, or of a new epoch: what was before is not known.
    First,
    /// The one that had to come.
    Next,
    /// A snapshot that skips so many events, which the server need not send.
    Conflated(u64),
    /// So many before it never came, or it builds on what did not.
    Lost(u64),
    /// It came before.
    Duplicated,
    /// An older one that had not come; whether it had been counted as lost.
    Reordered(bool),
    /// It has no number.
    Unjudged,
}

/// Judges `event` and notes it. `resumes`: the connection said where it left off, so its first event may be a delta.
pub fn judge(subscriptions: &mut Vec<Subscription>, event: &Event, resumes: bool) -> Verdict {
    let known = subscriptions.iter_mut().find(|known| known.stream == event.stream);
    let Some(seq) = event.seq else {
        if known.is_none() {
            let Event { stream, sequence, .. } = *event;
            subscriptions.push(Subscription { stream, sequence, seq: 0, came: 0, missing: 0 });
            return Verdict::First;
        }
        return Verdict::Unjudged;
    };
    let fresh = Subscription { stream: event.stream, sequence: event.sequence, seq, came: 1, missing: 0 };
    // A delta of a sequence whose value was never sent cannot be applied.
    let can_begin = event.whole || event.base.is_none();
    let Some(known) = known else {
        subscriptions.push(fresh);
        return if can_begin || resumes && follows(seq, event.base) { Verdict::First } else { Verdict::Lost(1) };
    };
    if known.sequence != event.sequence {
        *known = fresh;
        return if can_begin { Verdict::First } else { Verdict::Lost(1) };
    }
    known.note(seq, event.base, event.whole)
}

/// Whether a delta builds on the event before it, as it must; a peer's that names no base is taken at its word.
fn follows(seq: u64, base: Option<u64>) -> bool {
    base.is_none_or(|base| base.checked_add(1) == Some(seq))
}

/// Whether the server may close a connection that reads: because it ends the service (1000, 1012), or with 4001 because the
/// token's `exp` came. Clocks of two machines may differ by a second.
pub fn may_close(code: u16, reason: &str, exp: Option<u64>, now_us: u64) -> bool {
    match (code, reason) {
        (1000 | 1012, _) => true,
        // What a foreign token holds may not be known.
        (4001, "token_expired") => exp.is_none_or(|exp| now_us >= exp.saturating_sub(1).saturating_mul(1_000_000)),
        _ => false,
    }
}

/// Whether a connection whose token ended at `exp` lives on although `leeway_us` and one second more are over.
pub fn outlived(exp: Option<u64>, leeway_us: u64, now_us: u64) -> bool {
    exp.is_some_and(|exp| now_us > exp.saturating_add(1).saturating_mul(1_000_000).saturating_add(leeway_us))
}

impl Subscription {
    fn note(&mut self, seq: u64, base: Option<u64>, whole: bool) -> Verdict {
        if seq <= self.seq {
            let back = self.seq - seq;
            if back >= 64 {
                return Verdict::Reordered(false);
            }
            let bit = 1 << back;
            if self.came & bit != 0 {
                return Verdict::Duplicated;
            }
            let was_missing = self.missing & bit != 0;
            self.came |= bit;
            self.missing &= !bit;
            return Verdict::Reordered(was_missing);
        }
        let step = seq - self.seq;
        let skipped = step - 1;
        let follows = skipped == 0 && (whole || follows(seq, base));
        let shift = |bits: u64| if step >= 64 { 0 } else { bits << step };
        self.came = shift(self.came) | 1;
        self.missing = shift(self.missing);
        self.seq = seq;
        match (follows, whole) {
            (true, _) => Verdict::Next,
            (false, true) => Verdict::Conflated(skipped),
            (false, false) => {
                // Bits 1..=skipped stand for what was passed over.
                let gap = if skipped >= 63 { u64::MAX - 1 } else { ((1 << skipped) - 1) << 1 };
                self.missing |= gap;
                Verdict::Lost(skipped.max(1))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn event(sequence: u32, seq: u64, base: Option<u64>, whole: bool) -> Event {
        Event { stream: 0, sequence, seq: Some(seq), base, whole, ts_us: None }
    }

    /// Judges a script: `s5` a snapshot, `p5` the patch on 4, `p5<3` one on 3, `b5` without base; upper case: the next epoch.
    fn check(script: &str, expected: &[Verdict]) {
        check_resuming(script, false, expected);
    }

    fn check_resuming(script: &str, resumes: bool, expected: &[Verdict]) {
        let mut subscriptions = Vec::new();
        let verdicts: Vec<Verdict> = script
            .split(' ')
            .map(|word| {
                let (kind, rest) = word.split_at(1);
                let (seq, base) = rest.split_once('<').map_or((rest, None), |(seq, base)| (seq, Some(base)));
                let seq: u64 = seq.parse().expect("a number");
                let epoch = u32::from(kind.chars().all(char::is_uppercase));
                let base = base.map_or(seq - 1, |base| base.parse().expect("a number"));
                let event = match &*kind.to_lowercase() {
                    "s" => event(epoch, seq, None, true),
                    "p" => event(epoch, seq, Some(base), false),
                    _ => event(epoch, seq, None, false),
                };
                judge(&mut subscriptions, &event, resumes)
            })
            .collect();
        assert_eq!(verdicts, expected, "{script}");
    }

    #[test]
    fn events_that_follow_are_next() {
        use Verdict::{First, Next};
        check("s1 p2 p3 s4 b5", &[First, Next, Next, Next, Next]);
        check("b8 b9", &[First, Next]);
    }

    #[test]
    fn a_delta_comes_first_only_where_one_resumes() {
        use Verdict::{First, Lost, Next};
        check("p8 p9", &[Lost(1), Next]);
        check_resuming("p8 p9", true, &[First, Next]);
        check_resuming("p8<6 p9", true, &[Lost(1), Next]);
        check_resuming("s7 P8", true, &[First, Lost(1)]);
    }

    #[test]
    fn a_delta_that_names_an_older_base_loses_what_lies_between() {
        use Verdict::{Lost, Next, Reordered};
        // seq 45 on base 41 follows 41 by its base, and breaks the promise that base is seq - 1.
        check("s41 p45<41 p46", &[Verdict::First, Lost(3), Next]);
        check("s41 p45<41 p43", &[Verdict::First, Lost(3), Reordered(true)]);
        check("s41 p42<42", &[Verdict::First, Lost(1)]);
        check("s1 p2<1", &[Verdict::First, Next]);
    }

    #[test]
    fn ends_are_judged_by_code_and_by_the_token() {
        let check = |code, reason, exp, now_s: u64, expected| {
            assert_eq!(may_close(code, reason, exp, now_s * 1_000_000), expected, "{code} {reason} at {now_s}");
        };
        check(1000, "", Some(100), 50, true);
        check(1012, "draining", Some(100), 50, true);
        check(4001, "token_expired", Some(100), 101, true);
        check(4001, "token_expired", Some(100), 99, true);
        check(4001, "token_expired", Some(100), 98, false);
        check(4001, "token_expired", None, 50, true);
        check(4001, "session_expired", Some(100), 101, false);
        for (code, reason) in [(1001, "heartbeat_timeout"), (1008, "rate_limited"), (1011, ""), (1013, "write_stall")] {
            check(code, reason, Some(100), 101, false);
        }
        check(1005, "", None, 50, false);
    }

    #[test]
    fn a_token_is_outlived_one_second_after_its_leeway() {
        let at = |ms: u64| outlived(Some(100), 5_000_000, ms * 1000);
        assert!(!at(106_000) && at(106_001));
        assert!(!outlived(None, 0, u64::MAX) && !outlived(Some(u64::MAX), 5_000_000, u64::MAX));
    }

    #[test]
    fn a_snapshot_may_jump_and_a_delta_may_not() {
        use Verdict::{Conflated, First, Lost, Next};
        check("s1 s5 p6", &[First, Conflated(3), Next]);
        check("s1 p3 p4", &[First, Lost(1), Next]);
        check("s1 b5", &[First, Lost(3)]);
        check("s3 p4<2", &[First, Lost(1)]);
        check("s1 p200 p201", &[First, Lost(198), Next]);
    }

    #[test]
    fn what_comes_twice_or_late_is_told_apart() {
        use Verdict::{Conflated, Duplicated, First, Lost, Reordered};
        check("s1 s1", &[First, Duplicated]);
        check("s1 p3 p2 p2", &[First, Lost(1), Reordered(true), Duplicated]);
        check("s1 s4 p2", &[First, Conflated(2), Reordered(false)]);
        check("s1 s100 p2", &[First, Conflated(98), Reordered(false)]);
        check("s1 b65 b2 b2", &[First, Lost(63), Reordered(true), Duplicated]);
        check("s1 b66 b2", &[First, Lost(64), Reordered(false)]);
    }

    #[test]
    fn a_new_epoch_begins_with_a_snapshot() {
        use Verdict::{First, Lost, Next};
        check("s7 S1 P2", &[First, First, Next]);
        check("s7 P8", &[First, Lost(1)]);
    }

    #[test]
    fn streams_of_a_connection_are_judged_apart() {
        let mut subscriptions = Vec::new();
        let of =
            |stream, seq| Event { stream, sequence: stream, seq: Some(seq), base: None, whole: false, ts_us: None };
        assert_eq!(judge(&mut subscriptions, &of(0, 1), false), Verdict::First);
        assert_eq!(judge(&mut subscriptions, &of(1, 5), false), Verdict::First);
        assert_eq!(judge(&mut subscriptions, &of(0, 2), false), Verdict::Next);
        assert_eq!(judge(&mut subscriptions, &of(1, 5), false), Verdict::Duplicated);
        let unnumbered = Event { seq: None, ..of(2, 0) };
        assert_eq!(judge(&mut subscriptions, &unnumbered, false), Verdict::First);
        assert_eq!(judge(&mut subscriptions, &unnumbered, false), Verdict::Unjudged);
    }
}
