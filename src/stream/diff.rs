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

use std::cmp::Ordering;

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
    let mut patch =
        PatchWriter { out: vec![b'['], path: Vec::new(), array_key: options.array_key, work_left: options.work_max };
    let patch = patch.change(a, b, limit).ok().map(|()| closed(patch.out, b']'));
    let mut merge = Vec::new();
    let merge = merge_members(&mut merge, a, b, limit).ok().map(|()| closed(merge, b'}'));
    Change::Changed { patch, merge }
}

/// Whether [`diff`] finds two values equal, or equal but for the places that `ignore` names.
pub fn is_unchanged(old: &Document, new: &Document, ignore: &[Pointer]) -> bool {
    let ignore: Vec<&[String]> = ignore.iter().map(Pointer::tokens).collect();
    same_apart_from(old.root(), new.root(), &ignore)
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
            let (MemberChange::Removed(member) | MemberChange::Added(member) | MemberChange::Differs(_, member)) =
                change;
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
            let token =
                std::str::from_utf8(&unescaped).expect("a document's text is UTF-8 and its escapes are characters");
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
    for new in &news {
        while rest.next_if(|old| old.order(new).is_lt()).is_some() {}
        matches[new.place] = rest.next_if(|old| old.order(new).is_eq()).map(|old| old.place);
    }
    Some(matches)
}

/// The key of the element at `place`, its hash at hand for sorting.
struct ElementKey<'n> {
    hash: u64,
    value: Node<'n>,
    place: usize,
}

impl ElementKey<'_> {
    fn order(&self, other: &ElementKey<'_>) -> Ordering {
        self.hash.cmp(&other.hash).then_with(|| self.value.scalar_order(other.value))
    }
}

/// The elements' keys, sorted; none unless each element has one and no two the same.
fn sorted_keys<'n>(elements: &[Node<'n>], key: &str) -> Option<Vec<ElementKey<'n>>> {
    let mut keys = Vec::with_capacity(elements.len());
    for (place, element) in elements.iter().enumerate() {
        let value = element.member(key)?;
        if !matches!(value.kind(), Kind::String | Kind::Number | Kind::Boolean) {
            return None;
        }
        keys.push(ElementKey { hash: value.hash(), value, place });
    }
    keys.sort_unstable_by(ElementKey::order);
    let unique = keys.array_windows::<2>().all(|[a, b]| a.order(b).is_ne());
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

#[cfg(test)]
mod tests {
    use std::fmt::Write;

    use proptest::prelude::*;

    use super::*;
    use crate::codec::json::tests::colliding_strings;
    use crate::stream::apply::{apply_merge, apply_patch};

    const BY_ID: DiffOptions<'static> = DiffOptions { ignore: &[], array_key: Some("id"), work_max: WORK_MAX };

    fn parse(text: &str) -> Document {
        Document::parse(text.as_bytes()).unwrap_or_else(|error| panic!("{text}: {error}"))
    }

    fn text(bytes: &[u8]) -> &str {
        std::str::from_utf8(bytes).expect("UTF-8")
    }

    /// Compares, proves that each text leads from `old` to `new` and is smaller than it, and gives them back.
    fn proven(old: &Document, new: &Document, options: &DiffOptions<'_>) -> Option<(Option<String>, Option<String>)> {
        let Change::Changed { patch, merge } = diff(old, new, options) else {
            assert!(!options.ignore.is_empty() || old == new, "a change was missed");
            return None;
        };
        assert_ne!(old, new);
        let applied = [
            patch.as_ref().map(|patch| (patch, apply_patch(old.text(), patch))),
            merge.as_ref().map(|merge| (merge, apply_merge(old.text(), merge))),
        ];
        for (delta, result) in applied.into_iter().flatten() {
            let result = result.unwrap_or_else(|error| panic!("{}: {error}", text(delta)));
            let result = Document::parse(&result).expect("a value");
            assert!(
                result == *new,
                "{} + {} = {}, not {}",
                text(old.text()),
                text(delta),
                text(result.text()),
                text(new.text())
            );
            assert!(delta.len() < new.text().len());
            assert_eq!(Document::parse(delta).expect("JSON").text().len(), delta.len(), "white space");
        }
        Some((patch.map(|patch| text(&patch).to_owned()), merge.map(|merge| text(&merge).to_owned())))
    }

    /// Both values get a member that is large and the same, so that deltas pay.
    fn check(old: &str, new: &str, options: &DiffOptions<'_>, patch: Option<&str>, merge: Option<&str>) {
        let padded = |value: &str| parse(&format!("{{\"v\":{value},\"pad\":\"{}\"}}", "-".repeat(500)));
        let (found_patch, found_merge) = proven(&padded(old), &padded(new), options).expect("a change");
        assert_eq!(found_patch.as_deref(), patch, "patch from {old} to {new}");
        assert_eq!(found_merge.as_deref(), merge, "merge from {old} to {new}");
    }

    /// The object that begins so, with a member long enough that setting all of it does not pay.
    fn kept(beginning: &str) -> String {
        format!("{beginning},\"kept\":\"{}\"}}", "-".repeat(200))
    }

    #[test]
    fn members_are_added_removed_and_replaced() {
        check(
            &kept(r#"{"gone":2,"other":{"x":"x marks the spot","y":2}"#),
            &kept(r#"{"new":[null],"other":{"y":2.0,"x":"x marks the spot"}"#),
            &DiffOptions::default(),
            Some(
                r#"[{"op":"remove","path":"/v/gone"},{"op":"add","path":"/v/new","value":[null]},{"op":"replace","path":"/v/other/y","value":2.0}]"#,
            ),
            Some(r#"{"v":{"gone":null,"new":[null],"other":{"y":2.0}}}"#),
        );
    }

    #[test]
    fn the_spelling_of_a_number_is_a_change_that_of_a_string_is_none() {
        check(
            "1E5",
            "1e5",
            &DiffOptions::default(),
            Some(r#"[{"op":"replace","path":"/v","value":1e5}]"#),
            Some(r#"{"v":1e5}"#),
        );
        let (old, new) = (parse(r#"{"a":"\u00e9","b":[1]}"#), parse(r#"{"b":[1],"\u0061":"é"}"#));
        assert_eq!(diff(&old, &new, &DiffOptions::default()), Change::Unchanged);
    }

    #[test]
    fn a_name_is_escaped_for_the_pointer_and_for_the_string() {
        check(
            &kept(r#"{"a/b~c":1,"\u002f\"":1,"":1,"é\u0001":1"#),
            &kept(r#"{"a/b~c":2,"\/\"":2,"":2,"\u00e9\u0001":2"#),
            &DiffOptions::default(),
            Some(
                r#"[{"op":"replace","path":"/v/a~1b~0c","value":2},{"op":"replace","path":"/v/~1\"","value":2},{"op":"replace","path":"/v/","value":2},{"op":"replace","path":"/v/é\u0001","value":2}]"#,
            ),
            Some(r#"{"v":{"a/b~c":2,"\/\"":2,"":2,"\u00e9\u0001":2}}"#),
        );
    }

    #[test]
    fn merge_says_nothing_where_it_cannot() {
        let patch = |value| format!(r#"[{{"op":"replace","path":"/v","value":{value}}}]"#);
        for value in ["null", r#"{"a":null}"#, r#"{"a":{"b":null}}"#] {
            check("1", value, &DiffOptions::default(), Some(&patch(value)), None);
        }
        for value in ["[null]", r#"{"a":[{"b":null}]}"#, "{}"] {
            check("1", value, &DiffOptions::default(), Some(&patch(value)), Some(&format!(r#"{{"v":{value}}}"#)));
        }
        // What was null and is still, needs no word.
        check(
            r#"{"a":null,"b":1}"#,
            r#"{"a":null,"b":2}"#,
            &DiffOptions::default(),
            Some(r#"[{"op":"replace","path":"/v/b","value":2}]"#),
            Some(r#"{"v":{"b":2}}"#),
        );
        let pad = "-".repeat(100);
        let (old, new) = (parse(&format!("[1,\"{pad}\"]")), parse(&format!("[2,\"{pad}\"]")));
        let (patch, merge) = proven(&old, &new, &DiffOptions::default()).expect("a change");
        assert_eq!((patch.as_deref(), merge), (Some(r#"[{"op":"replace","path":"/0","value":2}]"#), None));
    }

    #[test]
    fn what_is_no_smaller_than_the_value_is_left_out() {
        // The patch has 41 bytes, the new value 13 and the pad.
        for (pad, has_patch) in [(0, false), (28, false), (29, true)] {
            let value = |v: &str| parse(&format!("{{\"v\":{v},\"{}\":1}}", "-".repeat(pad)));
            let (patch, merge) = proven(&value("1"), &value("22"), &DiffOptions::default()).expect("a change");
            assert_eq!((patch.is_some(), merge.as_deref()), (has_patch, Some(r#"{"v":22}"#)), "{pad}");
        }
        assert_eq!(proven(&parse(r#"{"v":1}"#), &parse(r#"{"v":22}"#), &DiffOptions::default()), Some((None, None)));
        for (old, new) in [("1", "2"), ("{}", "[]"), ("{\"a\":1}", "{}"), ("null", "\"a\"")] {
            assert_eq!(proven(&parse(old), &parse(new), &DiffOptions::default()), Some((None, None)));
        }
    }

    #[test]
    fn elements_are_aligned_by_what_they_are() {
        let (a, b) = (r#"["aaaaaaaaaaaaaaaa","bbbbbbbbbbbbbbbb","cccccccccccccccc","dddddddddddddddd"]"#, "");
        let options = DiffOptions::default();
        let patch_of = |new: &str| {
            let pad = "-".repeat(500);
            let (old, new) = (parse(&format!("[{a},\"{pad}\"]")), parse(&format!("[{new}{b},\"{pad}\"]")));
            proven(&old, &new, &options).expect("a change").0.expect("a patch")
        };
        assert_eq!(
            patch_of(r#"["bbbbbbbbbbbbbbbb","cccccccccccccccc","dddddddddddddddd","eeeeeeeeeeeeeeee"]"#),
            r#"[{"op":"remove","path":"/0/0"},{"op":"add","path":"/0/3","value":"eeeeeeeeeeeeeeee"}]"#
        );
        assert_eq!(
            patch_of(r#"["aaaaaaaaaaaaaaaa","x","bbbbbbbbbbbbbbbb","cccccccccccccccc","dddddddddddddddd"]"#),
            r#"[{"op":"add","path":"/0/1","value":"x"}]"#
        );
        assert_eq!(
            patch_of(r#"["aaaaaaaaaaaaaaaa","dddddddddddddddd"]"#),
            r#"[{"op":"remove","path":"/0/1"},{"op":"remove","path":"/0/1"}]"#
        );
        // Three operations are more than the array.
        assert_eq!(patch_of("[4,3,2,1]"), r#"[{"op":"replace","path":"/0","value":[4,3,2,1]}]"#);
        assert_eq!(patch_of("[]"), r#"[{"op":"replace","path":"/0","value":[]}]"#);
    }

    /// An array of leads with these ids and statuses.
    fn leads(rows: &[(&str, &str)]) -> String {
        let rows: Vec<String> = rows
            .iter()
            .map(|(id, status)| format!(r#"{{"id":{id},"status":"{status}","about":"a lead of some length"}}"#))
            .collect();
        format!("[{}]", rows.join(","))
    }

    #[test]
    fn objects_are_known_again_by_their_key() {
        check(
            &leads(&[("1", "new"), ("2", "new"), ("3", "new"), ("4", "new"), ("5", "new")]),
            &leads(&[("5", "won"), ("1", "new"), ("9", "new"), ("3", "new"), ("4", "lost")]),
            &BY_ID,
            Some(concat!(
                r#"[{"op":"remove","path":"/v/1"},{"op":"move","from":"/v/3","path":"/v/0"},"#,
                r#"{"op":"add","path":"/v/2","value":{"id":9,"status":"new","about":"a lead of some length"}},"#,
                r#"{"op":"replace","path":"/v/0/status","value":"won"},{"op":"replace","path":"/v/4/status","value":"lost"}]"#
            )),
            Some(&format!(
                "{{\"v\":{}}}",
                leads(&[("5", "won"), ("1", "new"), ("9", "new"), ("3", "new"), ("4", "lost")])
            )),
        );
    }

    #[test]
    fn a_key_that_two_have_or_one_lacks_is_no_key() {
        let same = [("1", "a"), ("1", "b"), ("2", "c"), ("3", "d"), ("4", "e"), ("5", "f")];
        let pad = |rows: &[(&str, &str)]| parse(&leads(rows));
        for odd in ["1", "null", "[]", "{}"] {
            let mut new = vec![(odd, "z")];
            new.extend(same);
            let (patch, _) = proven(&pad(&same), &pad(&new), &BY_ID).expect("a change");
            assert!(patch.expect("a patch").starts_with(r#"[{"op":"add","path":"/0","value":{"id""#));
        }
        // As keys, "1" and 1 are two, as are 1 and 1.0; "1" and "\u0031" are one.
        check(
            &leads(&[("1", "a"), ("\"1\"", "b"), ("1.0", "c")]),
            &leads(&[("1.0", "c"), ("\"\\u0031\"", "b"), ("1", "a")]),
            &BY_ID,
            Some(r#"[{"op":"move","from":"/v/2","path":"/v/0"},{"op":"move","from":"/v/2","path":"/v/1"}]"#),
            Some(&format!("{{\"v\":{}}}", leads(&[("1.0", "c"), ("\"\\u0031\"", "b"), ("1", "a")]))),
        );
    }

    #[test]
    fn ignored_places_make_no_change_and_travel_with_one() {
        let ignore: Vec<Pointer> = ["/at", "/meta/request~1id", "/rows/1/seen", "/list/1", "/list/2"]
            .iter()
            .map(|pointer| Pointer::parse(pointer).expect("a pointer"))
            .collect();
        let options = DiffOptions { ignore: &ignore, ..DiffOptions::default() };
        let old = r#"{"at":1,"meta":{"request/id":"a","page":1},"rows":[{"seen":1},{"seen":1}],"list":[0,1],"pad":"------------------------------------------------------------------------------"}"#;
        for (from, to) in [
            (r#""at":1,"#, r#""at":2,"#),
            (r#""at":1,"#, ""),
            (r#""at":1"#, r#""at":{"deep":[1]}"#),
            (r#""request/id":"a""#, r#""request\/id":"b""#),
            (r#""request/id":"a","#, ""),
            (r#"{"seen":1}]"#, r#"{"seen":2}]"#),
            (r#"{"seen":1}]"#, "{}]"),
            ("[0,1]", "[0]"),
            ("[0,1]", "[0,{},7]"),
        ] {
            let new = old.replace(from, to);
            assert_ne!(old, new);
            assert_eq!(diff(&parse(old), &parse(&new), &options), Change::Unchanged, "{from} {to}");
            assert_ne!(diff(&parse(old), &parse(&new), &DiffOptions::default()), Change::Unchanged);
            let mixed = new.replace(r#""page":1"#, r#""page":2"#);
            let (patch, _) = proven(&parse(old), &parse(&mixed), &options).expect("a change");
            assert!(patch.is_some());
        }
        for (from, to) in [
            (r#"[{"seen":1},"#, r#"[{"seen":2},"#),
            (r#"{"seen":1}]"#, r#"{"seen":1,"more":1}]"#),
            (r#"{"seen":1}]"#, r#"1]"#),
            (r#",{"seen":1}]"#, "]"),
            ("[0,1]", "[1,1]"),
            ("[0,1]", "[0,1,2,3]"),
            ("[0,1]", "{}"),
            (r#""meta":{"request/id":"a","page":1}"#, r#""meta":null"#),
            (r#""meta":{"request/id":"a","page":1},"#, ""),
        ] {
            let new = old.replace(from, to);
            assert_ne!(old, new);
            assert!(proven(&parse(old), &parse(&new), &options).is_some(), "{from} {to}");
        }
        let whole = [Pointer::default()];
        let options = DiffOptions { ignore: &whole, ..DiffOptions::default() };
        assert_eq!(diff(&parse("1"), &parse("[]"), &options), Change::Unchanged);
    }

    fn array(elements: impl Iterator<Item = String>) -> Document {
        parse(&format!("[{}]", elements.collect::<Vec<_>>().join(",")))
    }

    #[test]
    fn hostile_arrays_are_compared_in_bounded_work() {
        const COUNT: u32 = 100_000;
        let up = array((0..COUNT).map(|n| n.to_string()));
        let down = array((0..COUNT).rev().map(|n| n.to_string()));
        let other = array((0..COUNT).map(|n| (n + COUNT).to_string()));
        let same = array((0..COUNT).map(|_| "0".to_owned()));
        let two = array((0..COUNT).map(|n| (n % 2).to_string()));
        let rotated = array((1..=COUNT).map(|n| (n % COUNT).to_string()));
        let rows = array((0..COUNT).map(|n| format!("{{\"id\":{n}}}")));
        let rows_down = array((0..COUNT).rev().map(|n| format!("{{\"id\":{n}}}")));
        let nested = parse(&("[".repeat(128) + &"]".repeat(128)));
        for options in [DiffOptions::default(), DiffOptions { work_max: 0, ..BY_ID }] {
            for (old, new) in
                [(&up, &down), (&up, &other), (&same, &two), (&two, &same), (&rows, &rows_down), (&up, &nested)]
            {
                assert!(matches!(diff(old, new, &options), Change::Changed { patch: None, .. }));
            }
        }
        let Change::Changed { patch, .. } = diff(&up, &rotated, &DiffOptions::default()) else { panic!("a change") };
        let patch = patch.expect("two edits are found in so many");
        assert_eq!(text(&patch), r#"[{"op":"remove","path":"/0"},{"op":"add","path":"/99999","value":0}]"#);
        assert!(matches!(
            diff(&up, &rotated, &DiffOptions { work_max: 0, ..BY_ID }),
            Change::Changed { patch: None, .. }
        ));
    }

    #[test]
    fn aligning_is_charged_to_its_work_to_the_step() {
        let (old, new) = (parse("[1,2,3,4,5,6,7,8]"), parse("[9,2,3,4,5,6,7,0]"));
        let (old, new): (Vec<_>, Vec<_>) = (old.root().elements().collect(), new.root().elements().collect());
        let mut work_left = WORK_MAX;
        let expected = common_subsequence(&old, &new, 4, &mut work_left);
        assert_eq!(expected.as_ref().map(Vec::len), Some(6));
        assert_eq!(common_subsequence(&old, &new, 3, &mut { WORK_MAX }), None);
        let mut work = WORK_MAX - work_left;
        assert_eq!(common_subsequence(&old, &new, 4, &mut (work - 1)), None);
        assert_eq!(common_subsequence(&old, &new, 4, &mut work), expected);
        assert_eq!(work, 0);
    }

    #[test]
    fn deep_values_are_compared_and_written_without_deep_cost() {
        let deep = |leaf: &str| {
            let pad = format!("\"pad\":\"{}\"", "-".repeat(1000));
            parse(&(format!("{{{pad},\"a\":[").repeat(64) + leaf + &"]}".repeat(64)))
        };
        let (patch, merge) = proven(&deep("1"), &deep("2"), &DiffOptions::default()).expect("a change");
        assert_eq!(patch, Some(format!("[{{\"op\":\"replace\",\"path\":\"{}\",\"value\":2}}]", "/a/0".repeat(64))));
        assert!(merge.is_some());
        // A name as long as the value, on the path of each change in it.
        let long =
            |n: usize| parse(&format!("{{\"{}\":[{}]}}", "n".repeat(100_000), vec![n.to_string(); 10_000].join(",")));
        assert_eq!(proven(&long(1), &long(2), &DiffOptions::default()), Some((None, None)));
    }

    #[test]
    fn values_of_one_hash_are_replaced_unread() {
        let strings = colliding_strings(2);
        let pad = "-".repeat(300);
        let value = |string: &str| {
            parse(&format!(
                "{{\"n\":{},\"deep\":{}{string:?}{},\"pad\":\"{pad}\"}}",
                string.len(),
                "[".repeat(120),
                "]".repeat(120)
            ))
        };
        let (old, new) = (value(&strings[0]), value(&strings[1]));
        assert_eq!(old.root().hash(), new.root().hash());
        assert_eq!(proven(&old, &new, &DiffOptions::default()), Some((None, None)));
        let within = |document: &Document, n: u32| parse(&format!("[{n},{},\"{pad}\"]", text(document.text())));
        let (patch, _) = proven(&within(&old, 1), &within(&new, 2), &BY_ID).expect("a change");
        assert!(patch.expect("a patch").contains(r#"{"op":"replace","path":"/1","value":{"n":16"#));
    }

    /// A value to be changed and written out in odd ways.
    #[derive(Clone, Debug)]
    enum Value {
        Scalar(&'static str),
        Array(Vec<Value>),
        Object(Vec<(usize, Value)>),
    }

    const SCALARS: [&str; 20] = [
        "null",
        "true",
        "false",
        "0",
        "-0",
        "1",
        "1.0",
        "1E5",
        "1e5",
        "1e+5",
        "123456789012345678901234567890",
        "-1.50",
        "\"\"",
        "\"a\"",
        "\"\\u0061\"",
        "\"é\"",
        "\"\\ud83d\\ude00\"",
        "\"\u{1F600}\"",
        "\"\\\"\\\\/\\/\\n\"",
        "\"some text that is long enough for a delta to pay\"",
    ];

    /// Names, each with another spelling.
    const NAMES: [(&str, &str); 10] = [
        ("", ""),
        ("a", "\\u0061"),
        ("b", "b"),
        ("a/b", "a\\/b"),
        ("~", "\\u007e"),
        ("~1/", "~1\\u002f"),
        ("é\\n", "\\u00e9\\u000a"),
        ("\\\"", "\\u0022"),
        ("id", "\\u0069d"),
        ("0", "\\u0030"),
    ];

    fn value() -> impl Strategy<Value = Value> {
        let scalar = prop::sample::select(&SCALARS[..]).prop_map(Value::Scalar);
        let row = (0..SCALARS.len(), 0..SCALARS.len()).prop_map(|(id, more)| {
            Value::Object(vec![(8, Value::Scalar(SCALARS[id])), (1, Value::Scalar(SCALARS[more]))])
        });
        prop_oneof![scalar, row].prop_recursive(4, 60, 10, |inner| {
            let names = prop::sample::subsequence((0..NAMES.len()).collect::<Vec<_>>(), 0..=NAMES.len()).prop_shuffle();
            prop_oneof![
                prop::collection::vec(inner.clone(), 0..10).prop_map(Value::Array),
                (names, prop::collection::vec(inner, NAMES.len()))
                    .prop_map(|(names, values)| Value::Object(names.into_iter().zip(values).collect())),
            ]
        })
    }

    /// Deals out choices from one seed (splitmix64).
    struct Dice(u64);

    impl Dice {
        fn below(&mut self, bound: usize) -> usize {
            self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
            let mixed = (self.0 ^ self.0 >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            let mixed = (mixed ^ mixed >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
            ((mixed ^ mixed >> 31) % bound as u64) as usize
        }
    }

    impl Value {
        /// The value some time later: little of it changed, elements put elsewhere, members reordered.
        fn later(&self, dice: &mut Dice) -> Value {
            if dice.below(12) == 0 {
                return Value::Scalar(SCALARS[dice.below(SCALARS.len())]);
            }
            match self {
                Value::Scalar(text) => Value::Scalar(text),
                Value::Array(elements) => {
                    let mut elements: Vec<Value> = elements.iter().map(|element| element.later(dice)).collect();
                    for _ in 0..dice.below(4) {
                        if elements.is_empty() || dice.below(3) == 0 {
                            let id = Value::Scalar(SCALARS[dice.below(SCALARS.len())]);
                            elements.insert(dice.below(elements.len() + 1), Value::Object(vec![(8, id)]));
                        } else {
                            let taken = elements.remove(dice.below(elements.len()));
                            if dice.below(2) == 0 {
                                elements.insert(dice.below(elements.len() + 1), taken);
                            }
                        }
                    }
                    Value::Array(elements)
                }
                Value::Object(members) => {
                    let mut members: Vec<(usize, Value)> =
                        members.iter().map(|(name, value)| (*name, value.later(dice))).collect();
                    if !members.is_empty() && dice.below(3) == 0 {
                        members.remove(dice.below(members.len()));
                    }
                    let name = dice.below(NAMES.len());
                    if dice.below(3) == 0 && !members.iter().any(|(other, _)| *other == name) {
                        members.push((name, Value::Scalar(SCALARS[dice.below(SCALARS.len())])));
                    }
                    let by = dice.below(members.len() + 1);
                    members.rotate_left(by);
                    Value::Object(members)
                }
            }
        }

        fn write(&self, out: &mut String, dice: &mut Dice) {
            let space = [" ", "", "", "\n\t"][dice.below(4)];
            out.push_str(space);
            match self {
                Value::Scalar(text) => out.push_str(text),
                Value::Array(elements) => {
                    out.push('[');
                    for (place, element) in elements.iter().enumerate() {
                        out.push_str(if place > 0 { "," } else { "" });
                        element.write(out, dice);
                    }
                    out.push(']');
                }
                Value::Object(members) => {
                    out.push('{');
                    for (place, (name, value)) in members.iter().enumerate() {
                        let name = if dice.below(2) == 0 { NAMES[*name].0 } else { NAMES[*name].1 };
                        write!(out, "{}{space}\"{name}\"{space}:", if place > 0 { "," } else { "" }).expect("a string");
                        value.write(out, dice);
                    }
                    out.push('}');
                }
            }
            out.push_str(space);
        }

        /// As a document, in a large one of which nothing else changes, so that deltas pay.
        fn document(&self, dice: &mut Dice, pad: usize) -> Document {
            let mut out = String::new();
            self.write(&mut out, dice);
            parse(&if pad == 0 { out } else { format!("{{\"v\":{out},\"pad\":\"{}\"}}", "-".repeat(pad)) })
        }
    }

    /// The same with `json-patch`, an implementation that is not ours. It keeps numbers as serde_json does, not by spelling.
    fn check_with_json_patch(old: &Document, new: &Document, patch: Option<String>, merge: Option<String>) {
        let value = |document: &Document| serde_json::from_slice::<serde_json::Value>(document.text()).expect("JSON");
        if let Some(patch) = patch {
            let mut patched = value(old);
            let patch: json_patch::Patch = serde_json::from_str(&patch).expect("RFC 6902");
            json_patch::patch(&mut patched, &patch).expect("a patch that applies");
            assert_eq!(patched, value(new));
        }
        if let Some(merge) = merge {
            let mut merged = value(old);
            json_patch::merge(&mut merged, &serde_json::from_str(&merge).expect("JSON"));
            assert_eq!(merged, value(new));
        }
    }

    fn check_pair(old: &Document, new: &Document) {
        for options in [
            DiffOptions::default(),
            BY_ID,
            DiffOptions { work_max: 0, ..DiffOptions::default() },
            DiffOptions { work_max: 20, ..DiffOptions::default() },
        ] {
            if let Some((patch, merge)) = proven(old, new, &options) {
                check_with_json_patch(old, new, patch, merge);
            }
        }
    }

    proptest! {
        #[test]
        fn deltas_lead_from_any_value_to_any_other(old in value(), new in value(), seed: u64, pad in prop::sample::select(vec![0, 4000])) {
            let mut dice = Dice(seed);
            check_pair(&old.document(&mut dice, pad), &new.document(&mut dice, pad));
        }

        #[test]
        fn deltas_lead_from_a_value_to_a_later_one(old in value(), seed: u64, pad in prop::sample::select(vec![0, 300, 4000])) {
            let mut dice = Dice(seed);
            let new = old.later(&mut dice);
            check_pair(&old.document(&mut dice, pad), &new.document(&mut dice, pad));
        }

        #[test]
        fn a_value_written_otherwise_is_unchanged(value in value(), seed: u64) {
            let mut dice = Dice(seed);
            let documents = [value.document(&mut dice, 0), value.document(&mut dice, 0)];
            prop_assert_eq!(diff(&documents[0], &documents[1], &DiffOptions::default()), Change::Unchanged);
            prop_assert_eq!(documents[0].root().hash(), documents[1].root().hash());
        }

        #[test]
        fn rows_in_any_order_are_rearranged(
            old in prop::sample::subsequence((0..40).collect::<Vec<u32>>(), 0..40).prop_shuffle(),
            new in prop::sample::subsequence((0..40).collect::<Vec<u32>>(), 0..40).prop_shuffle(),
            kept in 0usize..10,
        ) {
            let rows = |ids: &[u32], state: u32| {
                array(ids.iter().map(|id| {
                    format!(r#"{{"id":"row {id}","state":{},"more":"{}"}}"#, if id % 5 == 0 { state } else { 0 }, "x".repeat(200))
                }))
            };
            let mut nearly = old.clone();
            nearly.truncate(old.len().saturating_sub(kept / 4));
            let by = kept.min(nearly.len());
            nearly.rotate_left(by);
            for new in [&new, &nearly] {
                let (old, new) = (rows(&old, 1), rows(new, 2));
                if let Some((patch, merge)) = proven(&old, &new, &BY_ID) {
                    check_with_json_patch(&old, &new, patch, merge);
                }
            }
        }

        #[test]
        fn a_change_under_an_ignored_place_alone_is_none(old in value(), seed: u64, place in 0..NAMES.len()) {
            let mut dice = Dice(seed);
            let with = |value: &Value, dice: &mut Dice| {
                let mut out = String::new();
                value.write(&mut out, dice);
                parse(&format!("{{\"a\":[1,{{\"{}\":{out},\"kept\":1}}]}}", NAMES[place].0))
            };
            let (a, b) = (with(&old, &mut dice), with(&old.later(&mut dice), &mut dice));
            let name = a.at(&Pointer::parse("/a/1").expect("a pointer")).expect("an object").members().next().expect("a member").name;
            let name = text(&name.unescaped()).to_owned();
            let ignore = [Pointer::parse(&format!("/a/1/{}", escape_token(&name))).expect("a pointer")];
            let options = DiffOptions { ignore: &ignore, ..DiffOptions::default() };
            prop_assert_eq!(diff(&a, &b, &options), Change::Unchanged);
            let elsewhere = parse(&text(b.text()).replace("\"kept\":1", "\"kept\":2"));
            prop_assert!(proven(&a, &elsewhere, &options).is_some());
        }
    }
}
