// The client library by itself: patches against the RFCs' examples, and every rule about time, under a clock of the test's.
import assert from 'node:assert/strict';
import { afterEach, beforeEach, test } from 'node:test';
import { events, problem, World } from './world.js';

const { applyMerge, applyPatch, connect } = await import(process.env.CLIENT);
const URL_ = 'https://live.example/v1/streams/leads';

// ---- RFC 6902 appendix A ----
const PATCHES = [
  ['A.1', { foo: 'bar' }, [{ op: 'add', path: '/baz', value: 'qux' }], { baz: 'qux', foo: 'bar' }],
  ['A.2', { foo: ['bar', 'baz'] }, [{ op: 'add', path: '/foo/1', value: 'qux' }], { foo: ['bar', 'qux', 'baz'] }],
  ['A.3', { baz: 'qux', foo: 'bar' }, [{ op: 'remove', path: '/baz' }], { foo: 'bar' }],
  ['A.4', { foo: ['bar', 'qux', 'baz'] }, [{ op: 'remove', path: '/foo/1' }], { foo: ['bar', 'baz'] }],
  ['A.5', { baz: 'qux', foo: 'bar' }, [{ op: 'replace', path: '/baz', value: 'boo' }], { baz: 'boo', foo: 'bar' }],
  ['A.6', { foo: { bar: 'baz', waldo: 'fred' }, qux: { corge: 'grault' } }, [{ op: 'move', from: '/foo/waldo', path: '/qux/thud' }],
    { foo: { bar: 'baz' }, qux: { corge: 'grault', thud: 'fred' } }],
  ['A.7', { foo: ['all', 'grass', 'cows', 'eat'] }, [{ op: 'move', from: '/foo/1', path: '/foo/3' }], { foo: ['all', 'cows', 'eat', 'grass'] }],
  ['A.8', { baz: 'qux', foo: ['a', 2, 'c'] }, [{ op: 'test', path: '/baz', value: 'qux' }, { op: 'test', path: '/foo/1', value: 2 }],
    { baz: 'qux', foo: ['a', 2, 'c'] }],
  ['A.9', { baz: 'qux' }, [{ op: 'test', path: '/baz', value: 'bar' }]],
  ['A.10', { foo: 'bar' }, [{ op: 'add', path: '/child', value: { grandchild: {} } }], { foo: 'bar', child: { grandchild: {} } }],
  ['A.11', { foo: 'bar' }, [{ op: 'add', path: '/baz', value: 'qux', xyz: 123 }], { foo: 'bar', baz: 'qux' }],
  ['A.12', { foo: 'bar' }, [{ op: 'add', path: '/baz/bat', value: 'qux' }]],
  ['A.13', { baz: 'qux' }, [{ op: 'what', path: '/baz', value: 'qux' }]],
  ['A.14', { '/': 9, '~1': 10 }, [{ op: 'test', path: '/~01', value: 10 }], { '/': 9, '~1': 10 }],
  ['A.15', { '/': 9, '~1': 10 }, [{ op: 'test', path: '/~01', value: '10' }]],
  ['A.16', { foo: ['bar'] }, [{ op: 'add', path: '/foo/-', value: ['abc', 'def'] }], { foo: ['bar', ['abc', 'def']] }],
  ['the whole', { a: 1 }, [{ op: 'replace', path: '', value: [1] }, { op: 'add', path: '/0', value: 0 }], [0, 1]],
  ['a copy is its own', { a: { b: [1] } }, [{ op: 'replace', path: '/a/b/0', value: 2 }, { op: 'copy', from: '/a', path: '/c' },
    { op: 'add', path: '/c/b/-', value: 3 }, { op: 'add', path: '/a/b/0', value: 1 }], { a: { b: [1, 2] }, c: { b: [2, 3] } }],
  ['a given value is its own', {}, [{ op: 'add', path: '/a', value: [1] }, { op: 'add', path: '/a/-', value: 2 }], { a: [1, 2] }],
  ['an empty name', { '': { '': 1 } }, [{ op: 'replace', path: '//', value: 2 }], { '': { '': 2 } }],
  ['into itself', { a: { b: 1 } }, [{ op: 'move', from: '/a', path: '/a/b' }]],
  ['no such member', {}, [{ op: 'replace', path: '/a', value: 1 }]],
  ['past the end', [1], [{ op: 'add', path: '/2', value: 1 }]],
  ['a leading zero', [1], [{ op: 'replace', path: '/00', value: 1 }]],
  ['the length', [1], [{ op: 'replace', path: '/length', value: 0 }]],
  ['no number', [1], [{ op: 'add', path: '/0.5', value: 0 }]],
  ['within null', { a: null }, [{ op: 'add', path: '/a/b', value: 0 }]],
  ['within a string', { a: 'text' }, [{ op: 'replace', path: '/a/0', value: 0 }]],
  ['what is inherited', {}, [{ op: 'remove', path: '/toString' }]],
  ['no pointer', { a: 1 }, [{ op: 'remove', path: 'a' }]],
  ['an inherited operation', { a: 1 }, [{ op: 'toString', path: '/a' }]],
];
for (const [name, before, patch, after] of PATCHES) test(`patch ${name}`, () => {
  const held = structuredClone(before), sent = structuredClone(patch);
  if (after === undefined) assert.throws(() => applyPatch(before, patch));
  else assert.deepEqual(applyPatch(before, patch), after);
  // Whether it applied or not: what the application holds, and was given, is as it was.
  assert.deepEqual(before, held);
  assert.deepEqual(patch, sent);
});

// ---- RFC 7396 appendix A ----
const MERGES = [
  [{ a: 'b' }, { a: 'c' }, { a: 'c' }], [{ a: 'b' }, { b: 'c' }, { a: 'b', b: 'c' }], [{ a: 'b' }, { a: null }, {}],
  [{ a: 'b', b: 'c' }, { a: null }, { b: 'c' }], [{ a: ['b'] }, { a: 'c' }, { a: 'c' }], [{ a: 'c' }, { a: ['b'] }, { a: ['b'] }],
  [{ a: { b: 'c' } }, { a: { b: 'd', c: null } }, { a: { b: 'd' } }], [{ a: [{ b: 'c' }] }, { a: [1] }, { a: [1] }],
  [['a', 'b'], ['c', 'd'], ['c', 'd']], [{ a: 'b' }, ['c'], ['c']], [{ a: 'foo' }, null, null], [{ a: 'foo' }, 'bar', 'bar'],
  [{ e: null }, { a: 1 }, { e: null, a: 1 }], [[1, 2], { a: 'b', c: null }, { a: 'b' }], [{}, { a: { bb: { ccc: null } } }, { a: { bb: {} } }],
];
test('merges as in RFC 7396', () => {
  for (const [before, merge, after] of MERGES) {
    const held = structuredClone(before);
    assert.deepEqual(applyMerge(before, merge), after);
    assert.deepEqual(before, held);
  }
});

test('a member called __proto__ is a member', () => {
  const before = JSON.parse('{"__proto__":{"a":1},"b":{}}');
  const patched = applyPatch(before, JSON.parse('[{"op":"replace","path":"/__proto__/a","value":2},{"op":"add","path":"/b/__proto__","value":3}]'));
  assert.equal(JSON.stringify(patched), '{"__proto__":{"a":2},"b":{"__proto__":3}}');
  assert.equal(JSON.stringify(applyMerge(before, JSON.parse('{"__proto__":{"a":null,"c":1}}'))), '{"__proto__":{"c":1},"b":{}}');
  assert.equal({}.a, undefined);
});

test('what a patch does not touch is shared, not copied', () => {
  const before = { rows: [{ id: 1 }, { id: 2 }], other: {} };
  const after = applyPatch(before, [{ op: 'replace', path: '/rows/1/id', value: 3 }]);
  assert.equal(after.rows[0], before.rows[0]);
  assert.equal(after.other, before.other);
  assert.notEqual(after.rows, before.rows);
  assert.equal(before.rows[1].id, 2);
});

// ---- a connection's life, under a clock ----
let world, seen, live;
beforeEach(() => {
  world = new World();
  seen = { values: [], patches: [], states: [], statuses: [], errors: [], asked: [], permissions: [] };
});
afterEach(() => { live?.close(); live = undefined; world.end(); World.WebSocketMissing = false; });

function open(options = {}, url = URL_) {
  live = connect(url, {
    getToken: ({ reason }) => { seen.asked.push(reason); return `t${seen.asked.length}.a.b`; },
    onValue: value => seen.values.push(value),
    onPatch: patch => seen.patches.push(patch),
    onStatus: status => { seen.states.push(status.state); seen.statuses.push(status); },
    onError: error => seen.errors.push(error),
    onPermissions: it => seen.permissions.push(it),
    ...options,
  });
  return live;
}
const only = { transports: ['websocket'] };
async function opened(options) {
  open(options);
  await world.settle();
  world.socket.welcomes();
  world.socket.says(snapshot(1, { n: 1 }));
}
const snapshot = (seq, data, epoch = 'e') => ({ type: 'snapshot', stream: 'leads', epoch, seq, ts: 1, data });
const patch = (seq, n, epoch = 'e') => ({ type: 'patch', stream: 'leads', epoch, seq, base: seq - 1, ts: 1, patch: [{ op: 'replace', path: '/n', value: n }] });

test('the token travels as a subprotocol, never in the address', async () => {
  open({ select: '$.a', maxRateMs: 500, format: 'merge' });
  await world.settle();
  assert.equal(world.socket.url, 'wss://live.example/v1/streams/leads?format=merge&select=%24.a&max_rate_ms=500');
  assert.deepEqual(world.socket.protocols, ['restcast.v1', 'jwt', 't1.a.b']);
  assert.deepEqual(seen.asked, ['connect']);
});

test('without a credential only the protocol is named, and a ticket stands in the address', async () => {
  open({ getToken: undefined });
  await world.settle();
  assert.deepEqual(world.socket.protocols, ['restcast.v1']);
  live.close();
  open({ getToken: () => ({ ticket: 'once' }) });
  await world.settle();
  assert.deepEqual(world.socket.protocols, ['restcast.v1']);
  assert.equal(world.socket.url, 'wss://live.example/v1/streams/leads?ticket=once');
});

test('values and patches arrive, repetitions do not', async () => {
  await opened();
  const first = live.value;
  world.socket.says(patch(2, 5));
  world.socket.says(patch(2, 6));
  world.socket.says({ type: 'merge', stream: 'leads', epoch: 'e', seq: 3, base: 2, ts: 1, merge: { m: 1 } });
  assert.deepEqual(live.value, { n: 5, m: 1 });
  assert.deepEqual(first, { n: 1 });
  assert.equal(live.at, 'e-3');
  assert.equal(seen.values.length, 3);
  assert.equal(seen.patches.length, 2);
  assert.equal(live.transport, 'websocket');
});

for (const [name, frame] of [
  ['a change is missing', patch(3, 9)], ['the epoch is another', patch(2, 9, 'f')],
  ['a patch does not apply', { ...patch(2, 9), patch: [{ op: 'remove', path: '/nothing' }] }],
]) test(`the whole value is asked for where ${name}`, async () => {
  await opened();
  world.socket.says(frame);
  assert.deepEqual(live.value, { n: 1 });
  assert.equal(world.socket.isClosed, true);
  await world.pass(0);
  assert.equal(world.sockets.length, 2, 'at once');
  assert.ok(!world.socket.url.includes('since'), world.socket.url);
  world.socket.welcomes();
  world.socket.says(snapshot(3, { n: 9 }));
  assert.deepEqual(live.value, { n: 9 });
  // A second gap in a row waits: a server that is wrong every time is not asked in a loop.
  world.socket.says(patch(7, 9));
  await world.pass(249);
  assert.equal(world.sockets.length, 2);
  await world.pass(1);
  assert.equal(world.sockets.length, 3);
});

test('a broken connection resumes where it was', async () => {
  await opened();
  world.socket.says(patch(2, 2));
  world.socket.ends(1006);
  await world.pass(500);
  assert.equal(world.socket.url, 'wss://live.example/v1/streams/leads?since=e-2');
  world.socket.welcomes();
  world.socket.says(patch(3, 3));
  assert.deepEqual(live.value, { n: 3 });
  assert.equal(seen.values.length, 3);
});

test('a held value may be given, and its place without it is not used', async () => {
  open({ since: 'k-7', value: { n: 7 } });
  await world.settle();
  assert.match(world.socket.url, /since=k-7$/);
  world.socket.welcomes();
  world.socket.says(patch(8, 8, 'k'));
  assert.deepEqual(live.value, { n: 8 });
  live.close();
  open({ since: 'k-7' });
  await world.settle();
  assert.ok(!world.socket.url.includes('since'));
});

test('retries double with full jitter, up to the most', async () => {
  world.chance = 0.999999;
  open(only);
  await world.settle();
  const gaps = [];
  for (let i = 0; i < 9; i++) {
    const before = world.now;
    world.socket.ends(1006);
    while (world.sockets.length < i + 2) await world.pass(50);
    gaps.push(Math.ceil(world.socket.at - before));
  }
  assert.deepEqual(gaps, [500, 1000, 2000, 4000, 8000, 16000, 30000, 30000, 30000]);
  world.chance = 0;
  world.socket.ends(1006);
  await world.pass(0);
  assert.equal(world.sockets.length, 11, 'jitter goes down to nothing');
});

test('the back-off starts anew only after a connection that held', async () => {
  world.chance = 0.999999;
  open(only);
  await world.settle();
  for (const [held, wait] of [[0, 500], [9999, 1000], [0, 2000], [10000, 500], [0, 1000]]) {
    world.socket.welcomes();
    await world.pass(held);
    const count = world.sockets.length;
    world.socket.ends(1006);
    await world.pass(wait - 1);
    assert.equal(world.sockets.length, count, `${held}, ${wait}`);
    await world.pass(1);
    assert.equal(world.sockets.length, count + 1, `${held}, ${wait}`);
  }
});

for (const code of [4001, 4008]) test(`${code}: a fresh token at once, then back-off`, async () => {
  await opened(only);
  world.socket.ends(code, 'token_expired');
  await world.pass(0);
  assert.deepEqual(seen.asked, ['connect', 'expired']);
  assert.deepEqual(world.socket.protocols, ['restcast.v1', 'jwt', 't2.a.b']);
  world.socket.welcomes();
  world.socket.ends(code, 'token_expired');
  await world.pass(249);
  assert.equal(world.sockets.length, 2);
  await world.pass(1);
  assert.equal(world.sockets.length, 3);
});

for (const code of [4003, 4004, 4010]) test(`${code} is final, and told`, async () => {
  await opened();
  world.socket.ends(code, 'why');
  await world.pass(3600000);
  assert.equal(world.sockets.length, 1);
  assert.equal(live.state, 'closed');
  assert.equal(live.status.code, code);
  assert.equal(live.status.reason, 'why');
  assert.equal(world.timers.length, 0);
  world.windowEvents.dispatchEvent(new Event('online'));
  await world.pass(1000);
  assert.equal(world.sockets.length, 1);
});

test('a drain is waited for as long as the server said, and no longer', async () => {
  await opened();
  world.socket.says({ type: 'reconnect', after_ms: 7300 });
  world.socket.ends(1012, 'draining');
  assert.equal(live.status.retryInMs, 7300);
  world.document.dispatchEvent(new Event('visibilitychange'));
  world.windowEvents.dispatchEvent(new Event('online'));
  await world.pass(7299);
  assert.equal(world.sockets.length, 1);
  await world.pass(1);
  assert.equal(world.sockets.length, 2);
});

for (const after_ms of [0, 3, null, 'soon', -5]) test(`servers that send it on one after the other are not asked in a loop: after_ms ${after_ms}`, async () => {
  world.chance = 0.999999;
  await opened(only);
  // The first is obeyed to the letter, from the second on it is no less than a back-off.
  for (const wait of [Math.max(0, Number(after_ms) || 0), 1000, 2000, 4000, 8000, 16000, 30000, 30000]) {
    const count = world.sockets.length;
    world.socket.says({ type: 'reconnect', after_ms });
    world.socket.ends(1012, 'draining');
    if (wait > 0) {
      await world.pass(wait - 1);
      assert.equal(world.sockets.length, count, `${wait}`);
    }
    await world.pass(wait > 0 ? 1 : 0);
    assert.equal(world.sockets.length, count + 1, `${wait}`);
    world.socket.welcomes();
  }
  assert.equal(seen.asked.length, 9);
  // What held is sent on as the server says again.
  await world.pass(10000);
  world.socket.says({ type: 'reconnect', after_ms: 40 });
  world.socket.ends(1012, 'draining');
  await world.pass(40);
  assert.equal(world.sockets.length, 10);
});

test('a drain right after a credential was refused is one of a row too', async () => {
  world.chance = 0.999999;
  await opened(only);
  world.socket.ends(4001, 'token_expired');
  await world.pass(0);
  world.socket.welcomes();
  world.socket.says({ type: 'reconnect', after_ms: 0 });
  world.socket.ends(1012, 'draining');
  await world.pass(499);
  assert.equal(world.sockets.length, 2);
  await world.pass(1);
  assert.equal(world.sockets.length, 3);
});

test('a server that says to wait for longer than the back-off is obeyed, however often', async () => {
  await opened(only);
  for (let count = 1; count < 4; count++) {
    world.socket.says({ type: 'reconnect', after_ms: 9000 });
    world.socket.ends(1012, 'draining');
    await world.pass(8999);
    assert.equal(world.sockets.length, count);
    await world.pass(1);
    assert.equal(world.sockets.length, count + 1);
    world.socket.welcomes();
  }
});

test('an overloaded server is given four times as long', async () => {
  world.chance = 0.999999;
  await opened(only);
  world.socket.ends(1013, 'overloaded');
  await world.pass(1999);
  assert.equal(world.sockets.length, 1);
  await world.pass(1);
  assert.equal(world.sockets.length, 2);
});

test('where a WebSocket does not open the event stream says why: 401 asks for a fresh token once, then waits', async () => {
  open();
  world.answer = () => problem(401, 'TOKEN_EXPIRED');
  await world.settle();
  world.socket.ends(1006);
  await world.pass(250);
  assert.equal(world.requests.length, 2, 'the second at once');
  assert.equal(world.requests[1].headers.Authorization, 'Bearer t3.a.b');
  assert.equal(world.requests[1].headers.Accept, 'text/event-stream');
  assert.ok(!world.requests[1].url.includes('t3'));
  assert.deepEqual(seen.asked, ['connect', 'connect', 'expired']);
  await world.pass(499);
  assert.equal(world.requests.length, 2);
  await world.pass(1);
  assert.equal(world.requests.length, 3);
});

test('signed out is signed out: final where a fresh token is refused for it too', async () => {
  open({ transports: ['sse'] });
  world.answer = () => problem(401, 'LOGGED_OUT');
  await world.pass(3600000);
  assert.deepEqual(seen.asked, ['connect', 'expired']);
  assert.deepEqual([live.state, live.status.code, live.status.reason], ['closed', 4010, 'logged_out']);
});

for (const [status, code] of [[403, 'FORBIDDEN'], [404, 'STREAM_NOT_FOUND'], [400, 'BAD_REQUEST']]) test(`HTTP ${status} is final`, async () => {
  open();
  world.answer = () => problem(status, code);
  await world.settle();
  world.socket.ends(1006);
  await world.pass(3600000);
  assert.equal(world.requests.length, 1);
  assert.deepEqual([live.state, live.status.code, live.status.reason], ['closed', status, code]);
});

for (const [status, code, after] of [[429, 'RATE_LIMITED', '7'], [503, 'STREAM_UNAVAILABLE', '7']]) test(`HTTP ${status} waits as long as Retry-After says`, async () => {
  open({ transports: ['sse', 'polling'] });
  world.answer = () => problem(status, code, { 'Retry-After': after });
  await world.pass(6999);
  assert.equal(world.requests.length, 1);
  await world.pass(1);
  assert.equal(world.requests.length, 2);
  assert.equal(world.requests[1].headers.Accept, 'text/event-stream', 'that it spoke means that it gets through');
});

test('a date in Retry-After is understood, and an hour is waited', async () => {
  const wall = Date.parse('Wed, 21 Oct 2015 07:28:00 GMT');
  world.replace({ Date: class extends Date { static now() { return wall; } } });
  open({ transports: ['sse'] });
  world.answer = () => problem(503, 'OVERLOADED', { 'Retry-After': new Date(wall + 3600000).toUTCString() });
  await world.pass(3599999);
  assert.equal(world.requests.length, 1);
  await world.pass(1);
  assert.equal(world.requests.length, 2);
});

test('a date in Retry-After is measured by the clock that wrote it, where that is told', async () => {
  open({ transports: ['sse'] });
  const there = Date.parse('Wed, 21 Oct 2015 07:28:00 GMT');
  world.answer = () => problem(503, 'OVERLOADED', { Date: new Date(there).toUTCString(), 'Retry-After': new Date(there + 120000).toUTCString() });
  await world.pass(119999);
  assert.equal(world.requests.length, 1);
  await world.pass(1);
  assert.equal(world.requests.length, 2);
});

for (const after of ['', '0', '-7', '1.5', 'soon', '3, 4', 'Wed, 21 Oct 2015 07:28:00 GMT']) test(`Retry-After "${after}" is no leave to ask in a loop`, async () => {
  world.chance = 0.999999;
  open({ transports: ['sse'] });
  world.answer = () => problem(503, 'OVERLOADED', { 'Retry-After': after });
  await world.pass(499);
  assert.equal(world.requests.length, 1);
  await world.pass(1);
  assert.equal(world.requests.length, 2);
  await world.pass(60000);
  assert.ok(world.requests.length < 9, `${world.requests.length}`);
});

for (const after of ['86401', '99999999999999999999']) test(`no server makes a page wait for more than a day, nor tries come at once: ${after}`, async () => {
  open({ transports: ['sse'] });
  world.answer = () => problem(503, 'OVERLOADED', { 'Retry-After': after });
  await world.pass(86399999);
  assert.equal(world.requests.length, 1);
  await world.pass(1);
  assert.equal(world.requests.length, 2);
});

test('a proxy without WebSockets, then without event streams: step by step down to polling, and up again', async () => {
  let isOpen = false;
  const stream = events();
  world.answer = async ({ headers }) => {
    if (headers.Accept === 'text/event-stream') return isOpen ? stream.response : new Response('<p>no</p>', { status: 502 });
    if (headers.Prefer) return new Promise(done => { setTimeout(() => done(new Response(null, { status: 304 })), 30000); });
    return new Response('{"n":4}', { headers: { ETag: 'W/"e-4"', 'X-Restcast-State': 'stale' } });
  };
  open();
  await world.settle();
  world.socket.ends(1006);
  await world.pass(250);
  await world.pass(500);
  assert.equal(live.transport, 'polling');
  assert.equal(live.state, 'live');
  assert.deepEqual([live.value, live.at, live.status.upstream.state], [{ n: 4 }, 'e-4', 'stale']);
  await world.pass(250);
  const waiting = world.requests.at(-1);
  assert.deepEqual([waiting.headers['If-None-Match'], waiting.headers.Prefer], ['"e-4"', 'wait=30']);

  // A minute later the better ones are tried beside it, without an interruption.
  isOpen = true;
  await world.pass(60000 - 250);
  assert.equal(world.sockets.length, 2);
  assert.equal(live.transport, 'polling');
  world.socket.ends(1006);
  await world.settle();
  stream.says({ type: 'welcome', connection: 'c_2', heartbeat_ms: 25000 });
  await world.settle();
  assert.equal(live.transport, 'sse');
  assert.equal(waiting.signal.aborted, true);
  assert.match(world.requests.at(-1).url, /since=e-4$/);
  stream.writes('id: e-5\r\ndata: {"type":"patch","epoch":"e","seq":5,"base":4,"pat');
  await world.settle();
  stream.writes('ch":[{"op":"replace","path":"/n","value":"\\u00fc"}]}\r\n\r\n');
  await world.settle();
  assert.deepEqual(live.value, { n: 'ü' });
  assert.ok(!seen.states.slice(seen.states.indexOf('live')).includes('waiting'), 'nobody saw an interruption');

  // And from there to the best, sooner or later.
  for (let i = 0; i < 3; i++) { await world.pass(20000); stream.writes(':\n\n'); }
  assert.equal(world.sockets.length, 3);
  world.socket.welcomes();
  assert.equal(live.transport, 'websocket');
  assert.match(world.socket.url, /since=e-5$/);
});

test('what kind of answer it is may be spelled in capitals', async () => {
  const stream = events();
  world.answer = () => new Response(stream.response.body, { headers: { 'Content-Type': 'Text/Event-Stream; charset=utf-8' } });
  open({ transports: ['sse'] });
  await world.settle();
  stream.says({ type: 'welcome', connection: 'c_1', heartbeat_ms: 20000 });
  await world.settle();
  assert.equal(live.state, 'live');
});

test('a better transport that is throttled is tried again when the server said', async () => {
  let isThrottled = false;
  world.answer = async ({ headers }) => {
    if (headers.Accept === 'text/event-stream') return isThrottled ? problem(429, 'RATE_LIMITED', { 'Retry-After': '7200' }) : problem(502, '');
    return headers.Prefer ? new Promise(done => { setTimeout(() => done(new Response(null, { status: 304 })), 30000); })
      : new Response('1', { headers: { ETag: '"e-1"' } });
  };
  open();
  await world.settle();
  world.socket.ends(1006);
  await world.pass(1000);
  assert.equal(live.transport, 'polling');
  isThrottled = true;
  while (world.sockets.length < 2 && world.now < 1000000) await world.pass(1000);
  world.socket.ends(1006);
  await world.settle();
  await world.pass(7199999);
  assert.deepEqual([world.sockets.length, live.state], [2, 'live']);
  await world.pass(1);
  assert.equal(world.sockets.length, 3);
});

test('a stream that a proxy holds back is given up', async () => {
  const stream = events();
  world.answer = ({ headers }) => headers.Accept === 'text/event-stream' ? stream.response : problem(503, 'DRAINING');
  open({ transports: ['sse', 'polling'] });
  await world.pass(9999);
  assert.equal(world.requests.length, 1);
  await world.pass(1 + 250);
  assert.equal(world.requests.length, 2);
  assert.equal(world.requests[1].headers.Accept, 'application/json');
});

test('an event stream without a heartbeat is dead after two of them', async () => {
  const stream = events();
  world.answer = () => stream.response;
  open({ transports: ['sse'] });
  await world.settle();
  stream.says({ type: 'welcome', connection: 'c_1', heartbeat_ms: 20000 });
  await world.settle();
  for (let i = 0; i < 5; i++) { await world.pass(20000); stream.writes(':\n\n'); }
  assert.equal(live.state, 'live');
  await world.pass(39999);
  assert.equal(live.state, 'live');
  await world.pass(1);
  assert.equal(live.state, 'waiting');
  assert.equal(live.status.reason, 'heartbeat_timeout');
});

test('a silent WebSocket is asked whether it lives, and is given up where it says nothing', async () => {
  await opened(only);
  await world.pass(49999);
  assert.equal(world.socket.sent.length, 0);
  await world.pass(1);
  const [{ type, id }] = world.socket.sent;
  assert.equal(type, 'restcast.probe');
  world.socket.says({ type: 'error', code: 'UNKNOWN_TYPE', error: 'There is no message of this type', id });
  assert.deepEqual(seen.errors, [], 'the answer is no fault');
  await world.pass(40000);
  assert.equal(world.socket.sent.length, 1);
  assert.equal(live.state, 'live');
  assert.deepEqual(seen.errors, []);
  await world.pass(10001);
  assert.equal(world.socket.sent.length, 2);
  await world.pass(5000);
  assert.notEqual(live.state, 'live');
  assert.ok(seen.statuses.some(it => it.reason === 'heartbeat_timeout'));
});

test('a page that is shown again, or a network that is back, makes it try at once', async () => {
  await opened(only);
  world.chance = 0.999999;
  for (let i = 0; i < 6; i++) { world.socket.ends(1006); await world.pass(30000); }
  world.socket.ends(1006);
  const count = world.sockets.length;
  world.document.hidden = true;
  world.document.dispatchEvent(new Event('visibilitychange'));
  await world.pass(1);
  assert.equal(world.sockets.length, count, 'not when it is hidden');
  world.document.hidden = false;
  world.document.dispatchEvent(new Event('visibilitychange'));
  await world.pass(0);
  assert.equal(world.sockets.length, count + 1);
  world.socket.ends(1006);
  world.windowEvents.dispatchEvent(new Event('online'));
  await world.pass(0);
  assert.equal(world.sockets.length, count + 2);
  world.socket.welcomes();
  world.document.dispatchEvent(new Event('visibilitychange'));
  assert.equal(world.socket.sent.at(-1).type, 'restcast.probe', 'what seems alive is asked');
});

test('a token is renewed in band when the server asks', async () => {
  await opened();
  world.socket.says({ type: 'reauthenticate', expires_at: 1, expires_in_ms: 60000 });
  await world.settle();
  assert.deepEqual(seen.asked, ['connect', 'reauthenticate']);
  assert.deepEqual(world.socket.sent, [{ type: 'auth_update', token: 't2.a.b', id: world.socket.sent[0].id }]);
  world.socket.says({ type: 'auth_ok', id: world.socket.sent[0].id, expires_at: 5000000, permissions: ['read'] });
  assert.equal(live.status.expiresAt, 5000);
  assert.deepEqual(seen.permissions[0].permissions, ['read']);
  assert.equal(world.sockets.length, 1);
});

test('a refused renewal is told and tried again, three times in all', async () => {
  await opened();
  world.socket.says({ type: 'reauthenticate', expires_at: 1, expires_in_ms: 60000 });
  for (let i = 0; i < 5; i++) {
    await world.pass(5000);
    const last = world.socket.sent.at(-1);
    world.socket.says({ type: 'error', code: 'AUTH_UPDATE_REJECTED', error: 'refused', reason: 'expired', id: last.id });
    await world.settle();
  }
  assert.equal(world.socket.sent.length, 3);
  assert.deepEqual(seen.errors.slice(0, 3).map(it => it.code), Array(3).fill('AUTH_UPDATE_REJECTED'));
  assert.equal(live.state, 'live');
});

test('a token of somebody else drops the value and connects anew', async () => {
  await opened();
  world.socket.says({ type: 'reauthenticate', expires_at: 1, expires_in_ms: 60000 });
  await world.settle();
  world.socket.says({ type: 'error', code: 'AUTH_SUBJECT_MISMATCH', error: 'another', id: world.socket.sent.at(-1).id });
  await world.settle();
  assert.equal(live.value, undefined);
  await world.pass(0);
  assert.equal(world.sockets.length, 2);
  assert.ok(!world.socket.url.includes('since'));
  assert.deepEqual(seen.errors.map(it => it.code), ['AUTH_SUBJECT_MISMATCH']);
});

test('over an event stream a renewal is a request with the token in its body', async () => {
  const stream = events();
  world.answer = ({ method }) => method === 'POST'
    ? new Response(JSON.stringify({ type: 'auth_ok', expires_at: 9000000, permissions: [] })) : stream.response;
  open({ transports: ['sse'] });
  await world.settle();
  stream.says({ type: 'welcome', connection: 'c_9', heartbeat_ms: 20000 });
  stream.says({ type: 'reauthenticate', expires_at: 1, expires_in_ms: 1 });
  await world.settle();
  const { url, body, headers } = world.requests.at(-1);
  assert.equal(url, 'https://live.example/v1/connections/c_9/auth');
  assert.deepEqual(JSON.parse(body), { token: 't2.a.b' });
  assert.equal(headers.Authorization, undefined);
  assert.equal(live.status.expiresAt, 9000);
});

for (const [path, renewals] of [
  ['/api/v1/restcast/v1/streams/x', '/api/v1/restcast/v1/connections/c_9/auth'], ['/v1/v1/streams/v1', '/v1/v1/connections/c_9/auth'],
  ['/v1/direct?url=https://x.example/v1/y/v1/z', '/v1/connections/c_9/auth'],
]) test(`a renewal goes to the server that is watched, whatever stands before its paths: ${path}`, async () => {
  const stream = events();
  world.answer = ({ method }) => method === 'POST' ? new Response('{"expires_at":9000000}') : stream.response;
  open({ transports: ['sse'] }, `https://gate.example${path}`);
  await world.settle();
  stream.says({ type: 'welcome', connection: 'c_9', heartbeat_ms: 20000 });
  stream.says({ type: 'reauthenticate', expires_at: 1, expires_in_ms: 1 });
  await world.settle();
  assert.equal(world.requests.at(-1).url, `https://gate.example${renewals}`);
});

for (const [what, answer] of [
  ['a login page', () => new Response('<p>Sign in</p>', { headers: { 'Content-Type': 'text/html' } })],
  ['nothing', () => new Response(null, { status: 204 })],
]) test(`a renewal that is answered by ${what} has failed, and is tried again`, async () => {
  const stream = events();
  world.answer = ({ method }) => method === 'POST' ? answer() : stream.response;
  open({ transports: ['sse'] });
  await world.settle();
  stream.says({ type: 'welcome', connection: 'c_9', heartbeat_ms: 20000, auth: { expires_at: 7000000 } });
  stream.says({ type: 'reauthenticate', expires_at: 1, expires_in_ms: 1 });
  await world.pass(3000);
  assert.equal(world.requests.filter(it => it.method === 'POST').length, 3);
  assert.deepEqual([live.state, live.status.expiresAt, seen.errors.length], ['live', 7000, 3]);
});

test('a renewal that is throttled is tried again when the server said', async () => {
  const stream = events();
  world.answer = ({ method }) => method === 'POST' ? problem(429, 'RATE_LIMITED', { 'Retry-After': '8' }) : stream.response;
  open({ transports: ['sse'] });
  await world.settle();
  stream.says({ type: 'welcome', connection: 'c_9', heartbeat_ms: 20000 });
  stream.says({ type: 'reauthenticate', expires_at: 1, expires_in_ms: 1 });
  await world.pass(7999);
  assert.equal(world.requests.filter(it => it.method === 'POST').length, 1);
  await world.pass(1);
  assert.equal(world.requests.filter(it => it.method === 'POST').length, 2);
});

test('getToken may fail and may hang: told, and tried again', async () => {
  let calls = 0;
  open({ ...only, getToken: () => { calls += 1; if (calls === 1) throw new Error('offline'); return calls === 2 ? new Promise(() => {}) : 'a.b.c'; } });
  await world.settle();
  assert.equal(seen.errors[0].message, 'offline');
  assert.equal(live.state, 'waiting');
  await world.pass(250);
  assert.equal(calls, 2);
  await world.pass(30000);
  assert.match(seen.errors[1].message, /too long/);
  await world.pass(500);
  assert.equal(calls, 3);
  assert.equal(world.sockets.length, 1);
});

test('why a token is asked for is remembered until there is one', async () => {
  let isOffline = false;
  await opened({ ...only, getToken: ({ reason }) => { seen.asked.push(reason); if (isOffline) throw new Error('offline'); return 'a.b.c'; } });
  isOffline = true;
  world.socket.ends(4001, 'token_expired');
  await world.pass(0);
  await world.pass(250);
  isOffline = false;
  // Neither a try that failed nor a page that is shown again makes the old one good.
  world.document.dispatchEvent(new Event('visibilitychange'));
  await world.pass(0);
  assert.deepEqual(seen.asked, ['connect', 'expired', 'expired', 'expired']);
  world.socket.ends(1006);
  await world.pass(30000);
  assert.equal(seen.asked.at(-1), 'connect');
});

test('polling: a token that cannot be had is told, and tried again', async () => {
  let isOffline = false;
  world.answer = async ({ headers }) => headers.Prefer ? problem(401, 'TOKEN_EXPIRED') : new Response('1', { headers: { ETag: '"e-1"' } });
  open({ transports: ['polling'], getToken: ({ reason }) => { seen.asked.push(reason); if (isOffline) throw new Error('offline'); return 'a.b.c'; } });
  await world.settle();
  isOffline = true;
  await world.pass(250);
  assert.deepEqual(seen.errors.map(it => it.message), ['offline']);
  assert.deepEqual([live.state, live.status.reason], ['waiting', 'getToken']);
  isOffline = false;
  await world.pass(250);
  assert.deepEqual([seen.asked, live.state], [['connect', 'expired', 'expired'], 'live']);
});

test('polling: a ticket is good once, and so is asked for at every request', async () => {
  let number = 0, refused = 0;
  const spent = new Set();
  world.answer = async ({ url }) => {
    const ticket = new URL(url).searchParams.get('ticket');
    if (!ticket || spent.has(ticket)) { refused++; return problem(401, 'INVALID_TOKEN'); }
    spent.add(ticket);
    return new Response(`${spent.size}`, { headers: { ETag: `"e-${spent.size}"` } });
  };
  open({ transports: ['polling'], getToken: () => ({ ticket: `once${++number}` }) });
  await world.pass(2600);
  assert.deepEqual([live.value, number, refused], [11, 11, 0]);
});

test('closing while it says that it connects asks for no token', async () => {
  open({ onStatus: ({ state }) => { if (state !== 'waiting' && seen.states.push(state) === 2) live.close(); } });
  await world.settle();
  world.socket.ends(1006);
  await world.pass(1000);
  assert.deepEqual([seen.states, seen.asked], [['connecting', 'connecting', 'closed'], ['connect']]);
  assert.equal(world.timers.length, 0);
});

test('callbacks that throw break nothing', async () => {
  const thrower = () => { throw new Error('of the application'); };
  const logged = [];
  const was = console.error;
  console.error = error => logged.push(error.message);
  try {
    await opened({ onValue: thrower, onPatch: thrower, onStatus: thrower, onPermissions: thrower, onError: thrower });
    world.socket.says(patch(2, 2));
    world.socket.says({ type: 'permission_update', permissions: [] });
    world.socket.says(patch(3, 3));
  } finally { console.error = was; }
  assert.deepEqual(live.value, { n: 3 });
  assert.ok(logged.length >= 6 && logged.every(it => it === 'of the application'));
});

test('what is not understood is left alone, what is not JSON starts the connection anew', async () => {
  await opened();
  world.socket.says({ type: 'of the future' });
  world.socket.says(null);
  world.socket.says([1]);
  world.socket.says({ type: 'auth_ok', id: 99 });
  assert.equal(live.state, 'live');
  world.socket.onmessage({ data: '{"type":' });
  await world.pass(0);
  assert.equal(world.sockets.length, 2);
});

test('actions are answered by their id, refused, or fail with the connection', async () => {
  open();
  await assert.rejects(live.send({ type: 'x' }), { code: 'DISCONNECTED' });
  await world.settle();
  world.socket.welcomes();
  const [first, second, third] = [{ type: 'a', id: 'mine' }, { type: 'b' }, { type: 'c' }].map(it => live.send(it));
  const late = live.send({ type: 'd' });
  world.socket.says({ type: 'action_result', id: world.socket.sent[1].id, status: 200, body: { ok: 2 } });
  world.socket.says({ type: 'error', code: 'ACTION_FAILED', error: 'no', id: 'mine', status: 409 });
  assert.deepEqual(await second, { status: 200, body: { ok: 2 } });
  await assert.rejects(first, { code: 'ACTION_FAILED', status: 409 });
  const unanswered = [assert.rejects(third, { code: 'DISCONNECTED' }), assert.rejects(late, { code: 'DISCONNECTED' })];
  world.socket.ends(1006);
  await Promise.all(unanswered);
  assert.deepEqual(seen.errors, []);
});

test('the id of an action is sent as it is: it may be the id of what is written', async () => {
  await opened();
  const [number, text] = [7, '7'].map(id => live.send({ type: 'property_update', id, property: {} }));
  const [none, other] = [null, undefined].map(id => live.send({ type: 'a', id }));
  const zero = live.send({ type: 'a', id: 0 });
  const ids = world.socket.sent.map(it => it.id);
  assert.deepEqual([ids[0], ids[1], ids[4]], [7, '7', 0]);
  assert.ok([ids[2], ids[3]].every(it => typeof it === 'string' && it.length <= 64) && ids[2] !== ids[3]);
  // An answer belongs to the id as it was spelled, and to none that is made here.
  await assert.rejects(live.send({ type: 'a', id: 7 }), { code: 'ID_IN_USE' });
  for (const id of [1, 2, 3, '1', '2', '3', 'probe']) live.send({ type: 'a', id }).catch(() => {});
  assert.equal(world.socket.sent.length, 12, 'one with an id that waits is not sent');
  ids.forEach((id, place) => world.socket.says({ type: 'action_result', id, status: 200 + place }));
  assert.deepEqual((await Promise.all([number, text, none, other, zero])).map(it => it.status), [200, 201, 202, 203, 204]);
  const again = live.send({ type: 'a', id: 7 });
  world.socket.says({ type: 'action_result', id: 7, status: 200 });
  assert.equal((await again).status, 200, 'what was answered is free again');
});

test('the error of an action called probe is not taken for that of a probe', async () => {
  await opened();
  const refused = assert.rejects(live.send({ type: 'a', id: 'probe' }), { code: 'ACTION_FAILED' });
  world.socket.says({ type: 'error', code: 'ACTION_FAILED', error: 'no', id: 'probe' });
  await refused;
});

test('an action without an answer ends by itself', async () => {
  await opened();
  const sent = assert.rejects(live.send({ type: 'a' }), { code: 'TIMEOUT' });
  await world.pass(30000);
  await sent;
});

test('an error that belongs to nothing is told', async () => {
  await opened();
  world.socket.says({ type: 'error', code: 'RATE_LIMITED', error: 'Too many messages' });
  assert.deepEqual(seen.errors.map(it => [it.code, it.message]), [['RATE_LIMITED', 'Too many messages']]);
});

test('closed is closed: no callback, no request, no timer', async () => {
  await opened();
  const counts = [seen.values.length, world.sockets.length];
  live.close();
  live.close();
  assert.equal(seen.states.filter(it => it === 'closed').length, 1);
  assert.equal(world.socket.isClosed, true);
  world.socket.says(patch(2, 2));
  world.socket.ends(1006);
  await world.pass(100000);
  assert.deepEqual([seen.values.length, world.sockets.length], counts);
  assert.equal(world.timers.length, 0);
  await assert.rejects(live.send({ type: 'a' }), { code: 'DISCONNECTED' });
});

test('closing within a callback is closing', async () => {
  await opened({ onPatch: () => live.close() });
  world.socket.says(patch(2, 2));
  assert.equal(live.state, 'closed');
  assert.equal(seen.values.length, 1, 'nothing is told after it');
  assert.equal(world.timers.length, 0);
});

test('a transport that worked is tried twice before the next: a server that is away is no proxy', async () => {
  await opened();
  world.answer = () => { throw new TypeError('unreachable'); };
  for (const [wait, sockets, requests] of [[250, 2, 0], [500, 3, 0], [1000, 3, 1]]) {
    world.socket.ends(1006);
    await world.pass(wait);
    assert.deepEqual([world.sockets.length, world.requests.length], [sockets, requests]);
  }
  // Another network: what worked there proves nothing here.
  world.windowEvents.dispatchEvent(new Event('online'));
  await world.pass(0);
  assert.equal(world.sockets.length, 4);
  world.socket.ends(1006);
  await world.pass(250);
  assert.equal(world.requests.length, 2);
});

test('a platform without WebSockets goes on to the next', async () => {
  World.WebSocketMissing = true;
  const stream = events();
  world.answer = () => stream.response;
  open();
  await world.pass(250);
  stream.says({ type: 'welcome', connection: 'c_1', heartbeat_ms: 20000 });
  await world.settle();
  assert.equal(live.transport, 'sse');
});

test('polling: a token that ends is replaced without a stop, one that is refused twice is backed off from', async () => {
  let fresh = 0;
  world.answer = async ({ headers }) => {
    if (headers.Authorization === 'Bearer t1.a.b' && !headers.Prefer) return new Response('{"n":1}', { headers: { ETag: '"e-1"' } });
    if (headers.Authorization === 'Bearer t2.a.b' && fresh++ === 0) return new Response('{"n":2}', { headers: { ETag: '"e-2"' } });
    return problem(401, 'TOKEN_EXPIRED');
  };
  open({ transports: ['polling'] });
  await world.pass(0);
  await world.pass(250);
  assert.deepEqual(live.value, { n: 2 });
  assert.deepEqual(seen.asked, ['connect', 'expired']);
  assert.ok(!seen.states.includes('waiting'));
  await world.pass(250);
  assert.ok(seen.states.includes('waiting'), 'the one after it is refused too');
  const count = world.requests.length;
  await world.pass(60000);
  assert.ok(world.requests.length - count < 15, 'in no tight loop');
});

test('polling never asks in a tight loop, whatever the server does', async () => {
  world.answer = async () => new Response(null, { status: 304 });
  open({ transports: ['polling'], since: 'e-1', value: 1 });
  await world.pass(10000);
  assert.ok(world.requests.length <= 12, `${world.requests.length}`);
  live.close();
  world.requests.length = 0;
  let n = 0;
  world.answer = async () => new Response(`${++n}`, { headers: { ETag: `"f-${n}"` } });
  open({ transports: ['polling'], maxRateMs: 1000 });
  await world.pass(10000);
  assert.ok(world.requests.length >= 9 && world.requests.length <= 11, `${world.requests.length}`);
});

test('polling at a rate of its own is not taken for silence', async () => {
  let n = 0;
  world.answer = async () => new Response(`${++n}`, { headers: { ETag: `"f-${n}"` } });
  open({ transports: ['polling'], maxRateMs: 300000 });
  await world.pass(600000);
  assert.equal(world.requests.length, 3);
  assert.deepEqual(seen.states.filter(it => it === 'waiting'), []);
});

test('polling in a page whose timers a browser holds back is not taken for silence', async () => {
  let answer;
  world.answer = ({ headers }) => headers.Prefer ? new Promise(done => { answer = done; }) : new Response('1', { headers: { ETag: '"f-1"' } });
  open({ transports: ['polling'] });
  await world.settle();
  // A hidden page's timers run once a minute, in their order.
  for (const timer of world.timers) timer.at = Math.max(timer.at, world.now + 59999);
  await world.pass(60000);
  assert.equal(world.requests.length, 2);
  await world.pass(30000);
  answer(new Response(null, { status: 304 }));
  await world.settle();
  assert.deepEqual(seen.states, ['connecting', 'live']);
  // A request that is answered by nobody is given up all the same.
  await world.pass(60250);
  assert.ok(seen.statuses.some(it => it.reason === 'heartbeat_timeout'));
});

for (const [what, answer] of [
  ['a login page', () => new Response('<!doctype html><p>Sign in', { headers: { 'Content-Type': 'text/html' } })],
  ['nothing', () => new Response(null, { status: 204 })],
  ['a refusal in HTML', () => new Response('<p>blocked', { status: 401, headers: { 'Content-Type': 'text/html' } })],
]) test(`a network that answers everything with ${what} is asked ever more seldom, and what was shown stays`, async () => {
  let isThere = true;
  world.answer = async ({ headers }) => !isThere ? answer() : headers.Accept === 'text/event-stream' ? problem(502, '')
    : new Response('5', { headers: { ETag: '"e-5"' } });
  open({ transports: ['sse', 'polling'] });
  await world.pass(1000);
  assert.deepEqual([live.transport, live.value], ['polling', 5]);
  isThere = false;
  const count = world.requests.length;
  await world.pass(600000);
  assert.ok(world.requests.length - count < 60, `${world.requests.length - count}`);
  assert.deepEqual([live.value, live.state === 'closed'], [5, false]);
  isThere = true;
  await world.pass(40000);
  assert.equal(live.state, 'live');
});

test('a back-off of long ago is forgotten by what held since, though over a lesser transport', async () => {
  world.chance = 0.999999;
  let isAway = true;
  world.answer = async ({ headers }) => isAway ? problem(503, 'OVERLOADED') : headers.Accept === 'text/event-stream' ? problem(502, '')
    : headers.Prefer ? new Promise(done => { setTimeout(() => done(new Response(null, { status: 304 })), 30000); }) : new Response('1', { headers: { ETag: '"e-1"' } });
  open({ transports: ['websocket', 'polling'] });
  await world.settle();
  world.socket.ends(1006);
  await world.pass(20000);
  isAway = false;
  while (world.sockets.length < 2 && world.now < 1000000) await world.pass(1000);
  assert.deepEqual([live.transport, live.state, world.sockets.length], ['polling', 'live', 2]);
  world.socket.welcomes();
  assert.equal(live.transport, 'websocket');
  await world.pass(5000);
  world.socket.ends(1006);
  await world.pass(500);
  assert.equal(world.sockets.length, 3);
});

test('many streams on one connection', async () => {
  open({}, 'https://live.example/v1/ws');
  await world.settle();
  assert.equal(world.socket.url, 'wss://live.example/v1/ws');
  const heard = { a: [], b: [], status: [] };
  const a = live.subscribe('a', { onValue: value => heard.a.push(value), maxRateMs: 100, format: 'merge' });
  world.socket.welcomes();
  assert.deepEqual(world.socket.sent, [{ type: 'subscribe', stream: 'a', format: 'merge', max_rate_ms: 100, id: world.socket.sent[0].id }]);
  const b = live.subscribe('b', { onValue: value => heard.b.push(value), onStatus: it => heard.status.push(it) });
  assert.throws(() => live.subscribe('a'), { code: 'ALREADY_SUBSCRIBED' });
  for (const { stream, id } of world.socket.sent) world.socket.says({ type: 'subscribed', stream, id });
  world.socket.says({ ...snapshot(1, { n: 1 }), stream: 'a' });
  world.socket.says({ ...snapshot(5, { n: 2 }, 'x'), stream: 'b' });
  world.socket.says({ type: 'stream_status', stream: 'b', state: 'stale', code: 'UPSTREAM_TIMEOUT' });
  assert.deepEqual([a.value, b.value, a.at, b.at, heard.status[0].state], [{ n: 1 }, { n: 2 }, 'e-1', 'x-5', 'stale']);
  // A gap in one is no matter of the other's, nor of the connection's.
  world.socket.says({ ...patch(9, 9), stream: 'a' });
  world.socket.says({ ...patch(10, 9), stream: 'a' });
  await world.pass(0);
  assert.deepEqual(world.socket.sent.slice(2), [{ type: 'unsubscribe', stream: 'a', id: world.socket.sent[2].id }, { type: 'subscribe', stream: 'a', format: 'merge', max_rate_ms: 100, id: world.socket.sent[3].id }]);
  world.socket.says({ type: 'unsubscribed', stream: 'a', reason: 'requested' });
  world.socket.says({ type: 'subscribed', stream: 'a', id: world.socket.sent[3].id });
  world.socket.says({ ...snapshot(10, { n: 10 }), stream: 'a' });
  assert.deepEqual(a.value, { n: 10 });
  // After a break each resumes where it was.
  world.socket.ends(1006);
  await world.pass(250);
  world.socket.welcomes();
  assert.deepEqual(world.socket.sent.map(it => [it.stream, it.since]), [['a', 'e-10'], ['b', 'x-5']]);
  a.close();
  a.close();
  assert.deepEqual(world.socket.sent.at(-1), { type: 'unsubscribe', stream: 'a', id: world.socket.sent.at(-1).id });
  world.socket.says({ type: 'error', code: 'FORBIDDEN', error: 'no', id: world.socket.sent[1].id, stream: 'b' });
  await world.settle();
  assert.deepEqual(heard.status.at(-1), { state: 'ended', code: 'FORBIDDEN' });
  assert.equal(live.state, 'live');
  // What may be otherwise the next time is asked for again.
  const c = live.subscribe('c');
  world.socket.says({ type: 'error', code: 'TOO_MANY_STREAMS', error: 'no', id: world.socket.sent.at(-1).id, stream: 'c' });
  await world.pass(15000);
  assert.deepEqual(seen.errors.map(it => it.code), ['TOO_MANY_STREAMS']);
  assert.deepEqual(world.socket.sent.filter(it => it.type === 'subscribe' && it.stream === 'c').length, 2);
  world.socket.says({ type: 'subscribed', stream: 'c', id: world.socket.sent.at(-1).id });
  world.socket.says({ ...snapshot(1, 3), stream: 'c' });
  assert.equal(c.value, 3);
});

const MANY = 'https://live.example/v1/ws';
const asked = stream => world.socket.sent.filter(it => it.type === 'subscribe' && it.stream === stream);
const confirms = (stream, as = stream) => world.socket.says({ type: 'subscribed', stream: as, id: asked(stream).at(-1).id });
async function openedMany() {
  open({}, MANY);
  await world.settle();
  // Without heartbeats, so that a quiet connection is not asked whether it lives.
  world.socket.welcomes({ heartbeat_ms: 0 });
}
function watched(stream, options) {
  const heard = { values: [], states: [] };
  heard.sub = live.subscribe(stream, { onValue: value => heard.values.push(value), onStatus: it => heard.states.push(it), ...options });
  return heard;
}

for (const code of ['TOO_MANY_STREAMS', 'STREAM_UNAVAILABLE'])
  test(`many streams: one that was confirmed and is given up with ${code} is asked for again, and whoever watches it is told`, async () => {
    await openedMany();
    const leads = watched('leads'), cold = watched('cold');
    confirms('leads');
    confirms('cold');
    world.socket.says(snapshot(1, { n: 1 }));
    for (const stream of ['leads', 'cold']) world.socket.says({ type: 'error', code, error: 'as many as there may be', stream });
    assert.deepEqual([leads, cold].map(it => it.states), [[{ state: 'stale', code, retry_in_ms: 15000 }], [{ state: 'failing', code, retry_in_ms: 15000 }]]);
    assert.deepEqual(seen.errors.map(it => [it.code, it.stream]), [[code, 'leads'], [code, 'cold']]);
    // Nothing is shown of what the server does not hold.
    world.socket.says(patch(2, 2));
    assert.deepEqual(leads.values, [{ n: 1 }]);
    await world.pass(14999);
    assert.equal(asked('leads').length, 1);
    await world.pass(1);
    assert.deepEqual(asked('leads').map(it => it.since), [undefined, 'e-1']);
    confirms('leads');
    world.socket.says(patch(2, 2));
    assert.deepEqual([leads.sub.value, leads.states.at(-1)], [{ n: 2 }, { state: 'live' }]);
    // One that is closed meanwhile is not asked for again.
    world.socket.says({ type: 'error', code, error: 'as many as there may be', stream: 'leads' });
    leads.sub.close();
    await world.pass(60000);
    assert.equal(asked('leads').length, 2);
    assert.equal(live.state, 'live');
  });

test('many streams: what is given up for good ends, with an id and without one, and may be asked for anew', async () => {
  await openedMany();
  const [a, b] = [watched('a'), watched('b')];
  confirms('a');
  world.socket.says({ type: 'error', code: 'FORBIDDEN', error: 'no', stream: 'a' });
  world.socket.says({ type: 'error', code: 'TOO_MANY_SUBSCRIPTIONS', error: 'no', stream: 'b', id: asked('b')[0].id });
  await world.pass(60000);
  assert.deepEqual([a.states, b.states], [[{ state: 'ended', code: 'FORBIDDEN' }], [{ state: 'ended', code: 'TOO_MANY_SUBSCRIPTIONS' }]]);
  assert.deepEqual([asked('a').length, asked('b').length, seen.errors], [1, 1, []]);
  watched('a');
  assert.equal(asked('a').length, 2);
});

test('many streams: a stream has in frames the name that the server gives it', async () => {
  await openedMany();
  const mine = watched('leads?b=x y&a=1'), twice = watched('leads?a=1&b=x%20y');
  const name = 'leads?a=1&b=x%20y';
  confirms('leads?b=x y&a=1', name);
  world.socket.says({ type: 'error', code: 'ALREADY_SUBSCRIBED', error: 'held', stream: name, id: asked(name)[0].id });
  world.socket.says({ ...snapshot(1, 1), stream: name });
  world.socket.says({ type: 'stream_status', stream: name, state: 'stale', code: 'UPSTREAM_DNS' });
  await world.settle();
  assert.deepEqual([mine.values, mine.states.length, twice.values, twice.states], [[1], 1, [], [{ state: 'ended', code: 'ALREADY_SUBSCRIBED' }]]);
  twice.sub.close();
  assert.equal(world.socket.sent.some(it => it.type === 'unsubscribe'), false);
  world.socket.says({ type: 'unsubscribed', stream: name, reason: 'forbidden' });
  assert.deepEqual(mine.states.at(-1), { state: 'ended', code: 'forbidden' });
});

test('many streams: what was on its way of one that was closed is not of the next of that name', async () => {
  await openedMany();
  const first = watched('leads');
  confirms('leads');
  world.socket.says(snapshot(1, { n: 1 }));
  first.sub.close();
  const second = watched('leads', { select: '$.n' });
  world.socket.says(snapshot(7, { n: 7 }));
  world.socket.says(patch(8, 8));
  world.socket.says({ type: 'stream_status', stream: 'leads', state: 'stale' });
  world.socket.says({ type: 'error', code: 'TOO_MANY_STREAMS', error: 'no', stream: 'leads' });
  world.socket.says({ type: 'unsubscribed', stream: 'leads', reason: 'forbidden' });
  // The server has given it up already, and says so to who leaves it: that is no news.
  world.socket.says({ type: 'error', code: 'STREAM_NOT_FOUND', error: 'not held', stream: 'leads', id: world.socket.sent.find(it => it.type === 'unsubscribe').id });
  assert.deepEqual([second.values, second.states], [[], []]);
  confirms('leads');
  world.socket.says(snapshot(1, 7, 'x'));
  assert.deepEqual([first.values, second.values, asked('leads').length], [[{ n: 1 }], [7], 2]);
});

test('many streams: an answer that comes too late is one all the same', async () => {
  await openedMany();
  const leads = watched('leads');
  await world.pass(30000);
  assert.deepEqual(leads.states.map(it => it.code), ['TIMEOUT']);
  confirms('leads');
  world.socket.says(snapshot(1, { n: 1 }));
  assert.deepEqual([leads.sub.value, leads.states.at(-1)], [{ n: 1 }, { state: 'live' }]);
  await world.pass(20000);
  assert.equal(asked('leads').length, 1);
  // Asked for twice, it is refused the second time, and held.
  world.socket.says({ type: 'error', code: 'TOO_MANY_STREAMS', error: 'no', stream: 'leads' });
  await world.pass(15000);
  await world.pass(30000);
  await world.pass(15000);
  assert.equal(asked('leads').length, 3);
  confirms('leads');
  world.socket.says({ type: 'error', code: 'ALREADY_SUBSCRIBED', error: 'held', stream: 'leads', id: asked('leads').at(-1).id });
  await world.settle();
  world.socket.says(patch(2, 2));
  assert.deepEqual([leads.sub.value, leads.states.at(-1)], [{ n: 2 }, { state: 'live' }]);
});

test('many streams: who was told that a stream is stale is told that it is live, be it after a break', async () => {
  await openedMany();
  const leads = watched('leads');
  confirms('leads');
  world.socket.says(snapshot(1, { n: 1 }));
  world.socket.says({ type: 'stream_status', stream: 'leads', state: 'stale', code: 'UPSTREAM_TIMEOUT' });
  world.socket.ends(1006);
  await world.pass(250);
  world.socket.welcomes();
  confirms('leads');
  assert.deepEqual(leads.states.map(it => it.state), ['stale', 'live']);
});

test('many streams: changes that do not fit time and again are not asked about without end', async () => {
  await openedMany();
  const leads = watched('leads');
  let answered = 0;
  for (let turn = 0; turn < 600; turn++) {
    if (asked('leads').length > answered) {
      answered++;
      confirms('leads');
      world.socket.says(snapshot(3 * turn + 1, { n: turn }));
    }
    world.socket.says(patch(3 * turn + 3, 9));
    await world.pass(100);
  }
  assert.ok(answered > 2 && answered < 10, `${answered} times in a minute`);
  while (asked('leads').length === answered) await world.pass(1000);
  confirms('leads');
  world.socket.says(snapshot(5000, { n: 5 }));
  assert.deepEqual(leads.sub.value, { n: 5 });
});

test('many streams: no more is said in a second than a server hears that way, and less to one that hears less', async () => {
  await openedMany();
  for (let no = 0; no < 64; no++) watched(`s${no}`);
  const most = from => {
    const at = world.socket.heard;
    return Math.max(...at.map((start, no) => at.slice(no).filter(it => it < start + 1000).length), 0);
  };
  const listen = () => {
    const { socket } = world, { send } = socket;
    socket.heard = [];
    socket.send = text => { socket.heard.push(world.now); send.call(socket, text); };
  };
  for (const [code, bound, ms] of [[1006, 50, 3000], [1008, 25, 6000], [1008, 13, 12000], [1006, 13, 12000]]) {
    const count = world.sockets.length;
    world.socket.ends(code);
    while (world.sockets.length === count) await world.pass(100);
    listen();
    world.socket.welcomes();
    await world.pass(ms);
    assert.equal(world.socket.heard.length, 64, `after ${code}`);
    assert.ok(most() <= bound, `${most()} of ${bound}`);
  }
});

test('many streams: one that is closed before its turn has come is not asked for', async () => {
  await openedMany();
  const all = Array.from({ length: 64 }, (_, no) => watched(`s${no}`));
  all.slice(30).forEach(it => it.sub.close());
  await world.pass(10000);
  assert.deepEqual([world.socket.sent.length, world.socket.sent.at(-1).stream], [30, 's29']);
});

test('many streams: why a WebSocket did not open is asked for', async () => {
  let answer = problem(401, 'TOKEN_EXPIRED');
  world.answer = () => answer.clone();
  open({}, 'https://live.example/v1/ws');
  await world.settle();
  world.socket.ends(1006);
  await world.pass(250);
  assert.equal(seen.statuses.filter(it => it.state === 'waiting').at(-1).code, 401);
  assert.equal(world.requests.length, 2, 'a fresh token at once');
  // It is not the credential: the WebSocket is tried again.
  answer = problem(426, 'UPGRADE_REQUIRED');
  await world.pass(500);
  await world.pass(2000);
  assert.equal(world.sockets.length, 2);
  answer = problem(403, 'FORBIDDEN');
  world.socket.ends(1006);
  await world.pass(8000);
  assert.deepEqual([live.state, live.status.code, live.status.reason], ['closed', 403, 'FORBIDDEN']);
});

// ---- tabs ----
const tabs = [];
afterEach(() => { for (const tab of tabs.splice(0)) tab.live.close(); });
async function tab(options) {
  const seen = { values: [], states: [], asked: 0, errors: [] };
  const live = connect(URL_, {
    shared: true, getToken: () => { seen.asked += 1; return 'a.b.c'; },
    onValue: value => seen.values.push(value), onStatus: ({ state }) => seen.states.push(state), onError: error => seen.errors.push(error), ...options,
  });
  tabs.push({ live, seen });
  await world.settle();
  return tabs.at(-1);
}

test('tabs: one connects, the others follow, and each has the value at once', async () => {
  world.tabs();
  const first = await tab();
  world.socket.welcomes();
  world.socket.says(snapshot(1, { n: 1 }));
  const second = await tab();
  assert.equal(world.sockets.length, 1);
  assert.deepEqual([second.seen.asked, second.live.value, second.live.at, second.live.state], [0, { n: 1 }, 'e-1', 'live']);
  world.socket.says(patch(2, 2));
  await world.settle();
  assert.deepEqual([first.live.value, second.live.value], [{ n: 2 }, { n: 2 }]);
  const other = await tab({ select: '$.n' });
  assert.equal(world.sockets.length, 2, 'who asks for something else has a connection of its own');
  other.live.close();
  // A frame that a tab did not hear: it asks the leader, and nobody reconnects.
  await world.settle();
  world.isDeaf = 1;
  world.sockets[0].says(patch(3, 3));
  await world.settle();
  world.isDeaf = undefined;
  world.sockets[0].says(patch(4, 4));
  await world.settle();
  assert.deepEqual(second.live.value, { n: 4 });
  assert.equal(world.sockets.length, 2);
  assert.deepEqual([...first.seen.errors, ...second.seen.errors], []);
});

test('tabs: an action, its refusal and a renewal go by way of the leader', async () => {
  world.tabs();
  await tab();
  world.socket.welcomes();
  const second = await tab();
  const sent = [second.live.send({ type: 'a', id: 7 }), second.live.send({ type: 'b' })];
  await world.settle();
  const [a, b] = world.socket.sent;
  assert.equal(a.id, 7);
  world.socket.says({ type: 'action_result', id: a.id, status: 200, body: 1 });
  world.socket.says({ type: 'error', id: b.id, code: 'ACTION_FAILED', error: 'no', status: 409 });
  assert.deepEqual(await sent[0], { status: 200, body: 1 });
  await assert.rejects(sent[1], { code: 'ACTION_FAILED', status: 409, message: 'no' });
  second.live.renew();
  await world.settle();
  assert.equal(world.socket.sent.at(-1).type, 'auth_update');
});

test('tabs: where somebody else is signed in, no tab shows on what the one before was shown', async () => {
  world.tabs();
  const [first, second] = [await tab(), await tab()];
  world.socket.welcomes();
  world.socket.says(snapshot(1, { n: 1 }));
  await world.settle();
  assert.deepEqual(second.live.value, { n: 1 });
  world.socket.says({ type: 'reauthenticate', expires_at: 1, expires_in_ms: 60000 });
  await world.settle();
  world.socket.says({ type: 'error', code: 'AUTH_SUBJECT_MISMATCH', error: 'another', id: world.socket.sent.at(-1).id });
  await world.settle();
  assert.deepEqual([first.live.value, second.live.value], [undefined, undefined]);
});

test('tabs: the next one takes over from where it was, and what is final is final for all', async () => {
  world.tabs();
  const [first, second, third] = [await tab(), await tab(), await tab()];
  world.socket.welcomes();
  world.socket.says(snapshot(1, { n: 1 }));
  await world.settle();
  first.live.close();
  await world.settle();
  assert.equal(world.sockets.length, 2);
  assert.match(world.socket.url, /since=e-1$/);
  assert.deepEqual([second.seen.asked, third.seen.asked], [1, 0]);
  world.socket.welcomes();
  world.socket.says(patch(2, 2));
  await world.settle();
  assert.deepEqual(third.live.value, { n: 2 });
  world.socket.ends(4010, 'logged_out');
  await world.settle();
  assert.deepEqual([second.live.status.code, third.live.status.code, third.live.state], [4010, 4010, 'closed']);
  await world.pass(100000);
  assert.equal(world.sockets.length, 2);
  assert.deepEqual([first.live.state, first.live.status.code], ['closed', 1000]);
});

test('tabs: one that is looked at takes over from a leader that sleeps, which follows when it wakes', async () => {
  world.tabs();
  const first = await tab();
  world.socket.welcomes();
  world.socket.says(snapshot(1, { n: 1 }));
  const second = await tab();
  await world.settle();
  // As long as the leader answers it stays the leader, however quiet the stream is.
  for (let i = 0; i < 6; i++) { await world.pass(10000); world.socket.says({ type: 'nothing' }); }
  assert.equal(world.sockets.length, 1);
  world.isDeaf = 0;
  await world.pass(20000);
  assert.equal(second.seen.asked, 0);
  await world.pass(10000);
  assert.equal(second.seen.asked, 1);
  assert.equal(world.sockets[0].isClosed, true);
  world.isDeaf = undefined;
  world.sockets[1].welcomes();
  world.sockets[1].says(patch(2, 2));
  await world.settle();
  assert.deepEqual([first.live.value, second.live.value, first.live.state], [{ n: 2 }, { n: 2 }, 'live']);
  // And it can lead again.
  second.live.close();
  await world.settle();
  assert.equal(world.sockets.length, 3);
  assert.equal(first.seen.asked, 2);
});

test('tabs: a tab that follows does not connect because the page is shown while its leader waits', async () => {
  world.tabs();
  const first = await tab();
  world.socket.welcomes();
  const second = await tab();
  world.socket.says({ type: 'reconnect', after_ms: 5000 });
  world.socket.ends(1012);
  await world.settle();
  assert.equal(second.live.state, 'waiting');
  world.document.dispatchEvent(new Event('visibilitychange'));
  world.windowEvents.dispatchEvent(new Event('online'));
  await world.pass(5000);
  assert.deepEqual([first.seen.asked, second.seen.asked], [2, 0]);
});

test('tabs: a leader that closes while an action of another is under way fails nothing of its own', async () => {
  world.tabs();
  const first = await tab();
  world.socket.welcomes();
  const second = await tab();
  const sent = assert.rejects(second.live.send({ type: 'a' }), { code: 'TIMEOUT' });
  await world.settle();
  // A rejection that nobody handles would fail this test.
  first.live.close();
  await world.settle();
  world.socket.welcomes();
  await world.pass(30000);
  await sent;
  assert.equal(second.live.state, 'live');
});

test('tabs: one that was hidden asks for its leader before it takes over', async () => {
  world.tabs();
  await tab();
  world.socket.welcomes();
  world.socket.says(snapshot(1, { n: 1 }));
  const second = await tab();
  const pass = async times => { for (let i = 0; i < times; i++) { await world.pass(10000); world.sockets[0].says({ type: 'nothing' }); } };
  world.document.hidden = true;
  await pass(60);
  world.document.hidden = false;
  await pass(10);
  assert.deepEqual([second.seen.asked, world.sockets.length], [0, 1]);
});

test('tabs: several that ask for a leader that sleeps do not take each other for it', async () => {
  world.tabs();
  const first = await tab();
  world.socket.welcomes();
  const second = await tab();
  await world.pass(3000);
  const third = await tab();
  world.isDeaf = 0;
  for (let i = 0; i < 40 && world.sockets.length < 2; i++) await world.pass(1000);
  assert.deepEqual([second.seen.asked, third.seen.asked], [1, 0]);
  assert.equal(world.sockets[0].isClosed, true);
  world.isDeaf = undefined;
  world.sockets[1].welcomes();
  await world.settle();
  assert.deepEqual([first.live.state, second.live.state, third.live.state], ['live', 'live', 'live']);
});

test('tabs: after a sleep of the whole machine nobody takes over from a leader that answers', async () => {
  world.tabs();
  await tab();
  world.socket.welcomes();
  const second = await tab();
  world.now += 8 * 3600000;
  await world.pass(10000);
  assert.equal(second.seen.asked, 0);
});

for (const [what, change] of [
  ['locks are refused', () => {
    let asked = 0;
    const request = async () => { if (++asked > 20) await new Promise(() => {}); throw new DOMException('no', 'SecurityError'); };
    world.replace({ navigator: { locks: { request } } });
  }],
  ['channels are refused', () => world.replace({ BroadcastChannel: class { constructor() { throw new DOMException('no', 'SecurityError'); } } })],
]) test(`tabs: where ${what}, as where cookies are, each has a connection of its own`, async () => {
  world.tabs();
  change();
  const first = await tab();
  await tab();
  assert.equal(world.sockets.length, 2);
  world.sockets[0].welcomes();
  world.sockets[0].says(snapshot(1, { n: 1 }));
  assert.deepEqual([first.live.value, first.live.state], [{ n: 1 }, 'live']);
  world.sockets[0].ends(1006);
  await world.pass(250);
  assert.equal(world.sockets.length, 3);
});

test('tabs: an action after the end is refused at once, not after half a minute', async () => {
  world.tabs();
  await tab();
  const second = await tab();
  second.live.close();
  await assert.rejects(second.live.send({ type: 'a' }), { code: 'DISCONNECTED' });
});

test('tabs: where the browser cannot, each has a connection of its own', async () => {
  await tab();
  await tab();
  assert.equal(world.sockets.length, 2);
});
