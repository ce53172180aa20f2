//! Whether each connection got each event once and in order, judged by sequence numbers alone.
//!
//! Source: protocol version 1, section 3: `seq` grows by one, a delta names its base, a snapshot may jump forward.
//! Memory: 48 bytes for each stream of a connection. Errors: none.

use crate::payload::Event;

/// One stream as one connection has seen it.
#[derive(Clone, Debug)]
pub struct Subscription {
    stream: u32,
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

/// Judges `event` and notes it.
pub fn judge(subscriptions: &mut Vec<Subscription>, event: &Event) -> Verdict {
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
    let Some(known) = known else {
        subscriptions.push(fresh);
        return Verdict::First;
    };
    if known.sequence != event.sequence {
        *known = fresh;
        // A delta of a sequence whose value was never sent cannot be applied.
        return if event.whole || event.base.is_none() { Verdict::First } else { Verdict::Lost(1) };
    }
    known.note(seq, event.base, event.whole)
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
        let follows = if whole { skipped == 0 } else { base.unwrap_or(seq - 1) == self.seq };
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
                judge(&mut subscriptions, &event)
            })
            .collect();
        assert_eq!(verdicts, expected, "{script}");
    }

    #[test]
    fn events_that_follow_are_next() {
        use Verdict::{First, Next};
        check("s1 p2 p3 s4 b5", &[First, Next, Next, Next, Next]);
        check("p8 p9", &[First, Next]);
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
        assert_eq!(judge(&mut subscriptions, &of(0, 1)), Verdict::First);
        assert_eq!(judge(&mut subscriptions, &of(1, 5)), Verdict::First);
        assert_eq!(judge(&mut subscriptions, &of(0, 2)), Verdict::Next);
        assert_eq!(judge(&mut subscriptions, &of(1, 5)), Verdict::Duplicated);
        let unnumbered = Event { seq: None, ..of(2, 0) };
        assert_eq!(judge(&mut subscriptions, &unnumbered), Verdict::First);
        assert_eq!(judge(&mut subscriptions, &unnumbered), Verdict::Unjudged);
    }
}
