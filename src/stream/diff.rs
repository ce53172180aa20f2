//! What changed between two values, as RFC 6902 and as RFC 7396 text.
//!
//! Source: RFC 6902 (patch), RFC 7396 (merge), protocol section 3 «Equality» and «Deltas».
//! Memory: the two texts under construction, each smaller than the new value's; 16 bytes per element of a changed array;
//! 4 bytes per unit of `work_max` while an array is aligned.
//! Errors: none; what cannot be told in fewer bytes than the new value is left out.  Not here: parsing (`codec::json`),
//! applying (`stream::apply`).
//!
//! Cost: subtrees of one hash are compared and passed over; only what differs is walked. A text is given up as soon as it
//! is no smaller than what it would replace, and aligning arrays without a key is charged to `work_max`, so the whole is
//! O(n log n) in the size of the two values but for the depth: what is nested d deep may be written d times over, at most
//! 128. Where two different values have one hash (a hostile upstream: see `codec::json`), they are replaced unread.

use crate::codec::json::{Document, Kind, MemberChange, Node, changed_members, write_string};
pub use crate::codec::pointer::{Pointer, PointerError};
use crate::codec::pointer::{array_index, escape_token};

/// Work for aligning arrays, in steps of about a nanosecond each: what [`DiffOptions::default`] has.
pub const WORK_MAX: u64 = 1 << 20;

/// How two values are to be compared.
#[derive(Clone, Copy, Debug)]
pub struct DiffOptions<'o> {
    /// Places that make no change by themselves: whether there, missing or other on either side.
    pub ignore: &'o [Pointer],
    /// Member by whose value, a scalar that no two have, the objects of an array are known again.
    pub array_key: Option<&'o str>,
    /// Steps that aligning arrays without such a key may take in one [`diff`]; past it they are compared place by place.
    pub work_max: u64,
}

impl Default for DiffOptions<'_> {
    fn default() -> Self {
        DiffOptions { ignore: &[], array_key: None, work_max: WORK_MAX }
    }
}

/// What [`diff`] found.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Change {
    /// Equal, or equal but for ignored places.
    Unchanged,
    /// Different. Each text, applied to the whole old value, gives the whole new one, ignored places included.
    Changed {
        /// RFC 6902 array, minified; none if it would not be smaller than the new text.
        patch: Option<Vec<u8>>,
        /// RFC 7396 object, minified; none if it would not be smaller than the new text, or cannot express the change:
        /// a member set to null, a value that is no object.
        merge: Option<Vec<u8>>,
    },
}

/// What leads from `old`, the value last published, to `new`.
pub fn diff(old: &Document, new: &Document, options: &DiffOptions<'_>) -> Change {
    let (a, b) = (old.root(), new.root());
    let ignore: Vec<&[String]> = options.ignore.iter().map(Pointer::tokens).collect();
    if same_apart_from(a, b, &ignore) {
        return Change::Unchanged;
    }
    // One byte is kept for each closing bracket, one for being smaller.
    let limit = new.text().len().saturating_sub(2);
    let mut patch = PatchWriter {
        out: vec![b'['],
        path: Vec::new(),
        array_key: options.array_key,
        work_left: options.work_max,
    };
    let patch = patch.change(a, b, limit).ok().map(|()| closed(patch.out, b']'));
    let mut merge = Vec::new();
    let merge = merge_members(&mut merge, a, b, limit).ok().map(|()| closed(merge, b'}'));
    Change::Changed { patch, merge }
}

fn closed(mut text: Vec<u8>, bracket: u8) -> Vec<u8> {
    text.push(bracket);
    text
}

/// Whether two values are equal but for the places that `ignore` names relative to them.
fn same_apart_from(a: Node<'_>, b: Node<'_>, ignore: &[&[String]]) -> bool {
    if ignore.iter().any(|tokens| tokens.is_empty()) || a == b {
        return true;
    }
    if ignore.is_empty() || a.hash() == b.hash() {
        return false;
    }
    match (a.kind(), b.kind()) {
        (Kind::Object, Kind::Object) => changed_members(a, b).iter().all(|change| {
            let (MemberChange::Removed(member) | MemberChange::Added(member) | MemberChange::Differs(_, member)) = change;
            let name = member.name.unescaped();
            let inner = below(ignore, |token| *token.as_bytes() == *name);
            match change {
                MemberChange::Differs(old, new) => same_apart_from(old.value, new.value, &inner),
                _ => inner.iter().any(|tokens| tokens.is_empty()),
            }
        }),
        (Kind::Array, Kind::Array) => same_elements_apart_from(a, b, ignore),
        _ => false,
    }
}

fn same_elements_apart_from(a: Node<'_>, b: Node<'_>, ignore: &[&[String]]) -> bool {
    // Elements that one side lacks are excused only by a pointer each.
    if a.len().abs_diff(b.len()) > ignore.len() {
        return false;
    }
    let (mut olds, mut news) = (a.elements(), b.elements());
    for index in 0.. {
        let pair = (olds.next(), news.next());
        if let (Some(old), Some(new)) = pair
            && old == new
        {
            continue;
        }
        let inner = below(ignore, |token| array_index(token) == Some(index));
        let excused = match pair {
            (None, None) => break,
            (Some(old), Some(new)) => same_apart_from(old, new, &inner),
            _ => inner.iter().any(|tokens| tokens.is_empty()),
        };
        if !excused {
            return false;
        }
    }
    true
}

/// What is left of the pointers whose first token leads here.
fn below<'i>(ignore: &[&'i [String]], leads_here: impl Fn(&str) -> bool) -> Vec<&'i [String]> {
    let firsts = ignore.iter().filter_map(|tokens| tokens.split_first());
    firsts.filter(|(first, _)| leads_here(first)).map(|(_, rest)| rest).collect()
}

/// A text is no smaller than what it should be smaller than, or cannot be.
struct Over;

/// Appends the object that merges `a` into `b`, but for its closing bracket. RFC 7396 section 2.
fn merge_members(out: &mut Vec<u8>, a: Node<'_>, b: Node<'_>, limit: usize) -> Result<(), Over> {
    if a.kind() != Kind::Object || b.kind() != Kind::Object || a.hash() == b.hash() {
        return Err(Over);
    }
    let mut separator = b'{';
    for change in changed_members(a, b) {
        let (name, value) = match change {
            MemberChange::Removed(old) => (old.name.raw(), None),
            MemberChange::Added(new) => (new.name.raw(), Some(new.value)),
            MemberChange::Differs(old, new) => {
                let both_objects = old.value.kind() == Kind::Object && new.value.kind() == Kind::Object;
                if both_objects {
                    append(out, limit, &[&[separator], new.name.raw(), b":"])?;
                    merge_members(out, old.value, new.value, limit)?;
                    append(out, limit, &[b"}"])?;
                    separator = b',';
                    continue;
                }
                (new.name.raw(), Some(new.value))
            }
        };
        match value {
            None => append(out, limit, &[&[separator], name, b":null"])?,
            Some(value) if holds_null(value) => return Err(Over),
            Some(value) => append(out, limit, &[&[separator], name, b":", value.raw()])?,
        }
        separator = b',';
    }
    Ok(())
}

/// Whether setting `value` would, by RFC 7396 section 2, remove a member instead: null, or an object that holds one other
/// than within an array.
fn holds_null(value: Node<'_>) -> bool {
    match value.kind() {
        Kind::Null => true,
        Kind::Object => value.members().any(|member| holds_null(member.value)),
        _ => false,
    }
}

fn append(out: &mut Vec<u8>, limit: usize, parts: &[&[u8]]) -> Result<(), Over> {
    if out.len() + parts.iter().map(|part| part.len()).sum::<usize>() > limit {
        return Err(Over);
    }
    parts.iter().for_each(|part| out.extend_from_slice(part));
    Ok(())
}

/// Writes the operations of one patch.
struct PatchWriter<'o> {
    /// The patch but for its closing bracket.
    out: Vec<u8>,
    /// Pointer to the value being compared, as it stands within a JSON string.
    path: Vec<u8>,
    array_key: Option<&'o str>,
    work_left: u64,
}

impl PatchWriter<'_> {
    /// Appends what makes `a`, at `path`, into `b`, as long as the patch is within `limit` bytes.
    fn change(&mut self, a: Node<'_>, b: Node<'_>, limit: usize) -> Result<(), Over> {
        if a == b {
            return Ok(());
        }
        let from = self.out.len();
        let path_len = self.path.len();
        // What is nested must be no larger than replacing all of it.
        let inner_limit = limit.min(from + REPLACE_BYTES + path_len + b.raw().len());
        let inner = match (a.kind(), b.kind()) {
            _ if a.hash() == b.hash() => Err(Over),
            (Kind::Object, Kind::Object) => self.members(a, b, inner_limit),
            (Kind::Array, Kind::Array) => self.elements(a, b, inner_limit),
            _ => Err(Over),
        };
        inner.or_else(|Over| {
            self.out.truncate(from);
            self.path.truncate(path_len);
            self.value_operation("replace", b, limit)
        })
    }

    fn members(&mut self, a: Node<'_>, b: Node<'_>, limit: usize) -> Result<(), Over> {
        for change in changed_members(a, b) {
            let path_len = self.path.len();
            match change {
                MemberChange::Removed(old) => {
                    self.enter_member(old.name, limit)?;
                    self.remove(limit)?;
                }
                MemberChange::Added(new) => {
                    self.enter_member(new.name, limit)?;
                    self.value_operation("add", new.value, limit)?;
                }
                MemberChange::Differs(old, new) => {
                    self.enter_member(new.name, limit)?;
                    self.change(old.value, new.value, limit)?;
                }
            }
            self.path.truncate(path_len);
        }
        Ok(())
    }

    fn elements(&mut self, a: Node<'_>, b: Node<'_>, limit: usize) -> Result<(), Over> {
        let prefix = a.elements().zip(b.elements()).take_while(|(a, b)| a == b).count();
        let olds: Vec<Node<'_>> = a.elements().skip(prefix).collect();
        let news: Vec<Node<'_>> = b.elements().skip(prefix).collect();
        let suffix = olds.iter().rev().zip(news.iter().rev()).take_while(|(a, b)| a == b).count();
        let olds = &olds[..olds.len() - suffix];
        let news = &news[..news.len() - suffix];

        if let Some(matches) = self.array_key.and_then(|key| match_by_key(olds, news, key)) {
            return self.rearrange(olds, news, &matches, prefix, limit);
        }
        let anchors = if mostly_in_place(olds, news) {
            Vec::new()
        } else {
            // Each edit takes at least half of a smallest operation: more of them than fit need not be looked for.
            let edits_max = limit.saturating_sub(self.out.len()) / (REMOVE_BYTES / 2);
            common_subsequence(olds, news, edits_max, &mut self.work_left).unwrap_or_default()
        };
        let (mut old, mut new) = (0, 0);
        for (old_anchor, new_anchor) in anchors.into_iter().chain([(olds.len(), news.len())]) {
            self.run(&olds[old..old_anchor], &news[new..new_anchor], prefix + new, limit)?;
            if let (Some(&a), Some(&b)) = (olds.get(old_anchor), news.get(new_anchor)) {
                // Of one hash, so commonly nothing to write.
                self.change_at(prefix + new_anchor, a, b, limit)?;
            }
            (old, new) = (old_anchor + 1, new_anchor + 1);
        }
        Ok(())
    }

    /// Makes the elements `olds`, which stand from `index` on, into `news`: place by place, then what is over.
    fn run(&mut self, olds: &[Node<'_>], news: &[Node<'_>], index: usize, limit: usize) -> Result<(), Over> {
        let paired = olds.len().min(news.len());
        for (place, (&a, &b)) in (index..).zip(olds.iter().zip(news)) {
            self.change_at(place, a, b, limit)?;
        }
        for _ in paired..olds.len() {
            self.at_index(index + paired, |patch| patch.remove(limit))?;
        }
        for (place, &value) in (index..).zip(news).skip(paired) {
            self.at_index(place, |patch| patch.value_operation("add", value, limit))?;
        }
        Ok(())
    }

    /// Makes `olds`, which stand from `first` on, into `news`, where `matches` has for each of these the one it was.
    ///
    /// First what is gone is removed, from the end. Of what stays as many as can keep their order are stationary; the
    /// rest is moved. Then, from the front, each element not stationary is added or moved to behind the one before it,
    /// in front of those of the same gap between stationary ones that still wait to be moved. So before a new element
    /// stand all new ones before it and whatever waits in gaps before its own. At last the matches are compared.
    fn rearrange(
        &mut self,
        olds: &[Node<'_>],
        news: &[Node<'_>],
        matches: &[Option<usize>],
        first: usize,
        limit: usize,
    ) -> Result<(), Over> {
        let mut kept = vec![false; olds.len()];
        matches.iter().flatten().for_each(|&old| kept[old] = true);
        for old in (0..olds.len()).rev().filter(|&old| !kept[old]) {
            self.at_index(first + old, |patch| patch.remove(limit))?;
        }

        // (old place, new place) of those that keep their order, in it.
        let stationary = longest_rising(matches);
        let mut waiting = Tally::new(olds.len());
        matches.iter().flatten().for_each(|&old| waiting.add(old, 1));
        stationary.iter().for_each(|&(old, _)| waiting.add(old, -1));

        let mut passed = 0;
        for (new, &value) in news.iter().enumerate() {
            if stationary.get(passed).is_some_and(|&(_, place)| place == new) {
                passed += 1;
                continue;
            }
            // Elements in front of this gap that still wait.
            let gap_begin = passed.checked_sub(1).map_or(0, |last| stationary[last].0);
            match matches[new] {
                None => {
                    let to = first + new + waiting.before(gap_begin);
                    self.at_index(to, |patch| patch.value_operation("add", value, limit))?;
                }
                Some(old) => {
                    let gap = stationary.partition_point(|&(place, _)| place < old);
                    let placed = if gap >= passed { new - passed } else { stationary[gap].1 - gap };
                    let from = first + gap + placed + waiting.before(old);
                    waiting.add(old, -1);
                    let to = first + new + waiting.before(gap_begin);
                    if from != to {
                        self.relocate(from, to, limit)?;
                    }
                }
            }
        }
        for (new, old) in matches.iter().enumerate() {
            if let Some(old) = *old {
                self.change_at(first + new, olds[old], news[new], limit)?;
            }
        }
        Ok(())
    }

    fn change_at(&mut self, index: usize, a: Node<'_>, b: Node<'_>, limit: usize) -> Result<(), Over> {
        if a == b { Ok(()) } else { self.at_index(index, |patch| patch.change(a, b, limit)) }
    }

    /// Does `write` with `path` pointing to element `index`.
    fn at_index(&mut self, index: usize, write: impl FnOnce(&mut Self) -> Result<(), Over>) -> Result<(), Over> {
        let path_len = self.path.len();
        push_index(&mut self.path, index);
        write(self)?;
        self.path.truncate(path_len);
        Ok(())
    }

    /// Makes `path` point to the member called `name`.
    fn enter_member(&mut self, name: Node<'_>, limit: usize) -> Result<(), Over> {
        let raw = name.raw();
        // The path alone must not outgrow what the patch may have: a name can be as long as the value.
        if self.path.len() + raw.len() > limit {
            return Err(Over);
        }
        self.path.push(b'/');
        if raw.iter().any(|b| matches!(b, b'~' | b'/' | b'\\')) {
            // An escape can stand for `~` or `/`, which the pointer escapes in its own way (RFC 6901 section 5).
            let unescaped = name.unescaped();
            let token = std::str::from_utf8(&unescaped).expect("a document's text is UTF-8 and its escapes are characters");
            let mut string = Vec::with_capacity(raw.len() + 2);
            write_string(&mut string, &escape_token(token));
            self.path.extend_from_slice(&string[1..string.len() - 1]);
        } else {
            self.path.extend_from_slice(&raw[1..raw.len() - 1]);
        }
        Ok(())
    }

    fn separator(&self) -> &'static [u8] {
        if self.out.len() == 1 { b"" } else { b"," }
    }

    /// `add` or `replace` of what `path` points to.
    fn value_operation(&mut self, name: &str, value: Node<'_>, limit: usize) -> Result<(), Over> {
        let head = [self.separator(), b"{\"op\":\"", name.as_bytes(), b"\",\"path\":\""];
        let parts = [head[0], head[1], head[2], head[3], &self.path, b"\",\"value\":", value.raw(), b"}"];
        append(&mut self.out, limit, &parts)
    }

    fn remove(&mut self, limit: usize) -> Result<(), Over> {
        let parts = [self.separator(), b"{\"op\":\"remove\",\"path\":\"", &self.path, b"\"}"];
        append(&mut self.out, limit, &parts)
    }

    /// `move` within the array that `path` points to.
    fn relocate(&mut self, from: usize, to: usize, limit: usize) -> Result<(), Over> {
        let (mut from_token, mut to_token) = (Vec::new(), Vec::new());
        push_index(&mut from_token, from);
        push_index(&mut to_token, to);
        let head = [self.separator(), b"{\"op\":\"move\",\"from\":\""];
        let parts = [head[0], head[1], &self.path, &from_token, b"\",\"path\":\"", &self.path, &to_token, b"\"}"];
        append(&mut self.out, limit, &parts)
    }
}

/// Bytes of `,{"op":"replace","path":"","value":}`.
const REPLACE_BYTES: usize = 36;
/// Bytes of `{"op":"remove","path":"/0"}`.
const REMOVE_BYTES: usize = 27;

fn push_index(path: &mut Vec<u8>, index: usize) {
    let mut digits = [0; 20];
    let mut from = digits.len();
    let mut left = index;
    loop {
        from -= 1;
        digits[from] = b"0123456789"[left % 10];
        left /= 10;
        if left == 0 {
            break;
        }
    }
    path.push(b'/');
    path.extend_from_slice(&digits[from..]);
}

/// Whether three in four stand where they stood, so that place by place is the way to compare them.
fn mostly_in_place(olds: &[Node<'_>], news: &[Node<'_>]) -> bool {
    let moved = olds.iter().zip(news).filter(|(a, b)| a.hash() != b.hash()).count();
    olds.len() == news.len() && moved * 4 <= olds.len()
}

/// For each of `news` the place in `olds` of the object with the same value of member `key`. None unless every element of
/// both is an object with such a member, a string, number or Boolean that no other element of its side has.
fn match_by_key(olds: &[Node<'_>], news: &[Node<'_>], key: &str) -> Option<Vec<Option<usize>>> {
    let olds = sorted_keys(olds, key)?;
    let news = sorted_keys(news, key)?;
    let mut matches = vec![None; news.len()];
    let mut rest = olds.iter().peekable();
    for &(key, new) in &news {
        while rest.next_if(|(old, _)| old.scalar_order(key).is_lt()).is_some() {}
        matches[new] = rest.next_if(|(old, _)| old.scalar_order(key).is_eq()).map(|&(_, old)| old);
    }
    Some(matches)
}

/// The elements' keys, sorted, each with its element's place.
fn sorted_keys<'n>(elements: &[Node<'n>], key: &str) -> Option<Vec<(Node<'n>, usize)>> {
    let mut keys = Vec::with_capacity(elements.len());
    for (place, element) in elements.iter().enumerate() {
        let value = element.member(key)?;
        if !matches!(value.kind(), Kind::String | Kind::Number | Kind::Boolean) {
            return None;
        }
        keys.push((value, place));
    }
    keys.sort_unstable_by(|(a, _), (b, _)| a.scalar_order(*b));
    let unique = keys.array_windows::<2>().all(|[(a, _), (b, _)]| a.scalar_order(*b).is_ne());
    unique.then_some(keys)
}

/// The longest choice of `matches` in which the old places rise with the new ones, as (old place, new place). O(n log n).
fn longest_rising(matches: &[Option<usize>]) -> Vec<(usize, usize)> {
    // `tails[l]`: the new place whose old place is the least that ends a rising choice of l + 1.
    let mut tails: Vec<(usize, usize)> = Vec::new();
    let mut before: Vec<Option<usize>> = vec![None; matches.len()];
    for (new, old) in matches.iter().enumerate() {
        let Some(old) = *old else { continue };
        let length = tails.partition_point(|&(tail, _)| tail < old);
        before[new] = length.checked_sub(1).map(|shorter| tails[shorter].1);
        match tails.get_mut(length) {
            Some(tail) => *tail = (old, new),
            None => tails.push((old, new)),
        }
    }
    let mut rising = Vec::with_capacity(tails.len());
    let mut at = tails.last().map(|&(_, new)| new);
    while let Some(new) = at {
        rising.extend(matches[new].map(|old| (old, new)));
        at = before[new];
    }
    rising.reverse();
    rising
}

/// Counts at places, and their sums up to a place, each in O(log n): a Fenwick tree.
struct Tally {
    sums: Vec<i64>,
}

impl Tally {
    fn new(places: usize) -> Tally {
        Tally { sums: vec![0; places + 1] }
    }

    fn add(&mut self, place: usize, count: i64) {
        let mut at = place + 1;
        while let Some(sum) = self.sums.get_mut(at) {
            *sum += count;
            at += at & at.wrapping_neg();
        }
    }

    /// Counts at places before `place`.
    fn before(&self, place: usize) -> usize {
        let mut at = place;
        let mut total = 0;
        while at > 0 {
            total += self.sums[at];
            at &= at - 1;
        }
        usize::try_from(total).expect("what waits was counted in before it is counted out")
    }
}

/// Places of a longest common subsequence, compared by hash: (old, new), both rising. None if it takes more than
/// `edits_max` removals and insertions or more steps than `work_left`, which is charged.
///
/// E. W. Myers, «An O(ND) Difference Algorithm and Its Variations», 1986: for each number of edits, how far the old side
/// is got on each diagonal (old place less new place).
fn common_subsequence(
    olds: &[Node<'_>],
    news: &[Node<'_>],
    edits_max: usize,
    work_left: &mut u64,
) -> Option<Vec<(usize, usize)>> {
    if olds.is_empty() || news.is_empty() || olds.len().abs_diff(news.len()) > edits_max {
        return Some(Vec::new());
    }
    let a: Vec<u64> = olds.iter().map(|node| node.hash()).collect();
    let b: Vec<u64> = news.iter().map(|node| node.hash()).collect();
    // Row `edits` has a reach for each of its `edits` + 1 diagonals, -edits, -edits + 2, … edits, and begins at
    // edits * (edits + 1) / 2.
    let mut reaches: Vec<u32> = Vec::new();
    for edits in 0..=edits_max {
        let row = edits * (edits + 1) / 2;
        for lane in 0..=edits {
            let (_, mut x) = step(&reaches, edits, lane);
            let mut y = x + edits - 2 * lane;
            let from = x;
            while x < a.len() && y < b.len() && a[x] == b[y] {
                (x, y) = (x + 1, y + 1);
            }
            *work_left = work_left.checked_sub(1 + (x - from) as u64)?;
            reaches.push(u32::try_from(x).ok()?);
            if x == a.len() && y == b.len() {
                return Some(trace_back(&reaches[..row + lane + 1], edits, lane));
            }
        }
    }
    None
}

/// How diagonal `lane` of row `edits` is entered: the lane of the row before, and the old place it leads to. By an
/// insertion from the next diagonal, the old place staying, or by a removal from the one before.
fn step(reaches: &[u32], edits: usize, lane: usize) -> (usize, usize) {
    let Some(above) = edits.checked_sub(1) else { return (0, 0) };
    let row = above * edits / 2;
    let reach = |lane: usize| reaches[row + lane] as usize;
    if lane == 0 || (lane < edits && reach(lane - 1) < reach(lane)) {
        (lane, reach(lane))
    } else {
        (lane - 1, reach(lane - 1) + 1)
    }
}

/// The common elements on the way to the last of `reaches`.
fn trace_back(reaches: &[u32], edits: usize, lane: usize) -> Vec<(usize, usize)> {
    let mut common = Vec::new();
    let mut lane = lane;
    for edits in (0..=edits).rev() {
        let reach = reaches[edits * (edits + 1) / 2 + lane] as usize;
        let (from_lane, entered) = step(reaches, edits, lane);
        common.extend((entered..reach).rev().map(|x| (x, x + edits - 2 * lane)));
        lane = from_lane;
    }
    common.reverse();
    common
}
