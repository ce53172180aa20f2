// restcast in a browser: a live value over WebSocket, SSE or polling, for as long as there is a credential for it.
// What it does and what it takes: README.md and client.d.ts beside it. SPDX-License-Identifier: MIT OR Apache-2.0

const LADDER = ['websocket', 'sse', 'polling'];
const TOKEN_MS = 30000, ANSWER_MS = 30000, HANDSHAKE_MS = 10000, FIRST_POLL_MS = 40000, POLL_S = 30, PROBE_MS = 5000;
const ASKED_AHEAD_MS = 1250, ASKED_APART_MS = 50, ASKED_APART_MAX_MS = 1000;
const POLL_GAP_MS = 250, DIRECTED_MAX_MS = 86400000, EVENT_CHARS_MAX = 1 << 26, LEADER_MS = 10000, LEADER_ASKED_MAX = 2;

// Refusals of one subscription that may be other the next time.
const PASSING = /^(TIMEOUT|RATE_LIMITED|OVERLOADED|DRAINING|INTERNAL|TOO_MANY_STREAMS|\w+_UNAVAILABLE)$/;

const isObject = value => value !== null && typeof value === 'object' && !Array.isArray(value);
// A member may be called __proto__: plain assignment would lose it.
const put = (into, key, value) =>
  Object.defineProperty(into, key, { value, writable: true, enumerable: true, configurable: true });
const get = (from, key) => {
  if (from === null || typeof from !== 'object' || !Object.hasOwn(from, key) || (Array.isArray(from) && key === 'length'))
    throw new Error(`nothing at ${key}`);
  return from[key];
};
// A wait that a server asks for, as far as it is one.
const directed = ms => Math.min(DIRECTED_MAX_MS, ms) || 0;
const same = (a, b) =>
  a === b || (isObject(a) ? isObject(b) : Array.isArray(a) && Array.isArray(b))
    && Object.keys(a).length === Object.keys(b).length
    && Object.keys(a).every(key => Object.hasOwn(b, key) && same(a[key], b[key]));

// RFC 6902. The value is left as it is: what changes is copied, once, and the rest is shared.
export function applyPatch(value, patch) {
  const root = [value], fresh = new Set();
  const seek = pointer => {
    if (pointer && pointer[0] !== '/') throw new Error('not a JSON pointer');
    const keys = pointer.split('/').map(key => key.replaceAll('~1', '/').replaceAll('~0', '~'));
    keys[0] = '0';
    const last = keys.pop();
    const into = keys.reduce((at, key) => {
      let next = get(at, key);
      if (!fresh.has(next) && typeof next === 'object') {
        next = Array.isArray(next) ? next.slice() : next && { ...next };
        fresh.add(next);
        put(at, key, next);
      }
      return next;
    }, root);
    return [into, last];
  };
  const read = pointer => get(...seek(pointer));
  const add = (pointer, item) => {
    const [into, key] = seek(pointer);
    if (into === root) root[0] = item;
    else if (isObject(into)) put(into, key, item);
    else if (Array.isArray(into) && (key === '-' || (/^(0|[1-9]\d*)$/.test(key) && key <= into.length)))
      into.splice(key === '-' ? into.length : key, 0, item);
    else throw new Error(`no place ${key}`);
  };
  const remove = pointer => {
    const [into, key] = seek(pointer), item = get(into, key);
    if (into === root) root[0] = undefined;
    else if (isObject(into)) delete into[key];
    else into.splice(key, 1);
    return item;
  };
  const operations = {
    add: it => add(it.path, it.value),
    remove: it => remove(it.path),
    replace: it => { read(it.path); put(...seek(it.path), it.value); },
    move: it => add(it.path, remove(it.from)),
    copy: it => { add(it.path, read(it.from)); fresh.clear(); },
    test: it => { if (!same(read(it.path), it.value)) throw new Error('a test failed'); },
  };
  for (const it of patch) get(operations, it.op)(it);
  return root[0];
}

// RFC 7396; the value is left as it is.
export function applyMerge(value, merge) {
  if (!isObject(merge)) return merge;
  const result = isObject(value) ? { ...value } : {};
  for (const key of Object.keys(merge))
    if (merge[key] === null) delete result[key];
    else put(result, key, applyMerge(Object.hasOwn(result, key) ? result[key] : undefined, merge[key]));
  return result;
}

export function connect(url, options = {}) {
  const { getToken, transports = LADDER, backoffMs = 500, backoffMaxMs = 30000, stableMs = 10000, upgradeMs = 60000 } = options;
  const base = new URL(url, globalThis.location?.href);
  base.protocol = base.protocol.replace('ws', 'http');
  const isMany = base.pathname.endsWith('/v1/ws');
  // /v1/ws is a WebSocket alone; asked without an upgrade it says why there was none, which no script sees otherwise.
  const ladder = isMany ? ['websocket', 'sse'] : transports;
  const subs = new Map();               // by a stream's name; '' is the one of /v1/streams/…
  const waiting = new Map();            // by id: what an answer is awaited for
  const over = new AbortController();   // close() was called, or the server's word was final
  let link, candidate, timer, upgradeTimer;
  let status = { state: 'connecting' };
  let rung = 0, attempt = 0, hurried = 0, upgrades = 0, floorAt = 0, lastId = 0, need = 'connect';
  const own = Math.random() + '/';      // before the ids made here: an action may have one of its own, which is also data
  let channel, me, queue, release, unheard = 0, isFollower = false;
  const proven = new Set();             // transports that got through
  let apartMs = ASKED_APART_MS;         // from one subscription that is asked for to the next

  const now = () => performance.now();
  const failure = (error, more) => Object.assign(new Error(error || 'refused'), more);
  const fail = error => {
    try { (options.onError ?? console.error)(error); } catch (thrown) { console.error(thrown); }
  };
  const call = (callback, ...values) => {
    if (over.signal.aborted) return;
    try { callback?.(...values); } catch (error) { fail(error); }
  };
  const say = message => { if (!over.signal.aborted) channel?.postMessage(message); };
  const show = (state, more) => {
    status = { state, transport: link?.transport, upstream: subs.get('')?.upstream, expiresAt: link?.expiresAt, ...more };
    if (channel && !isFollower) say({ status });
    call(options.onStatus, status);
  };
  const subscription = (name, options) => ({ name, options, id: own + ++lastId, value: options.value, upstream: { state: 'live' }, at:
    'value' in options || options.format === 'full' ? /^(.+)-(\d+)$/.exec(options.since ?? '')?.slice(1) : undefined });
  // Where a subscription stands: what `since` and If-None-Match say.
  const place = sub => sub?.at?.join('-');

  // ---- asking and being answered ----
  const settle = (id, error, value) => {
    const one = waiting.get(id);
    waiting.delete(id);
    clearTimeout(one?.timer);
    if (one) error ? one.reject(error) : one.resolve(value);
    return one;
  };
  const request = (frame, send = link.send) => new Promise((resolve, reject) => {
    const id = frame.id ?? own + ++lastId;
    if (waiting.has(id)) throw failure('this id waits for its answer', { code: 'ID_IN_USE' });
    waiting.set(id, { resolve, reject, timer: setTimeout(() => settle(id, failure('no answer', { code: 'TIMEOUT' })), ANSWER_MS) });
    try { send({ ...frame, id }); } catch (error) { settle(id, error); }
  });
  const credential = async reason => {
    let timer;
    const late = new Promise((_, reject) => { timer = setTimeout(() => reject(failure('getToken took too long')), TOKEN_MS); });
    try {
      const token = await Promise.race([getToken?.({ reason }), late]);
      return isObject(token) ? token : { token };
    } finally { clearTimeout(timer); }
  };
  // What it is needed for is remembered until there is one: the old one does not become good because a try failed.
  const arm = async (mine, reason) => {
    try {
      mine.credential = await credential(reason);
      need = 'connect';
    } catch (error) {
      if (!mine.isOver) fail(error);
      mine.end({ reason: 'getToken', isWord: true });
    }
  };

  // ---- what the server says ----
  const changed = (sub, frame) => {
    if (!sub || (sub.at && frame.epoch === sub.at[0] && frame.seq <= sub.at[1])) return;
    const delta = frame[frame.type];
    if (frame.type === 'snapshot') {
      sub.value = frame.data;
      sub.isLost = false;
    } else {
      if (sub.isLost) return;
      if (!sub.at || frame.epoch !== sub.at[0] || frame.base !== +sub.at[1]) return gap(sub);
      try { sub.value = (frame.type === 'patch' ? applyPatch : applyMerge)(sub.value, delta); } catch { return gap(sub); }
    }
    sub.at = frame.epoch === undefined ? undefined : [frame.epoch, frame.seq];
    if (delta) call(sub.options.onPatch, delta, frame);
    call(sub.options.onValue, sub.value, frame);
  };
  // Something is missing: the whole value is asked for.
  const gap = sub => {
    sub.at = undefined;
    sub.isLost = true;
    if (isFollower) return say({ hello: me });
    if (!isMany) return link.end({ code: 1006, reason: 'gap', isHasty: true });
    const isFirst = !(now() - sub.gapAt < stableMs);
    sub.gapAt = now();
    leave(sub);
    again(sub, isFirst ? 0 : backoffMaxMs * Math.random());
  };
  const receive = (frame, from) => {
    if (!isObject(frame)) return;
    // Of one that is not confirmed on this link, or was left, nothing is heard.
    const sub = isMany ? link.held.get(frame.stream) : subs.get('');
    switch (frame.type) {
      case 'welcome':
        if (from === candidate) promote();
        Object.assign(link, { id: frame.connection, upAt: now(), heartbeatMs: frame.heartbeat_ms });
        expiry(frame.auth?.expires_at);
        if (sub) sub.upstream = { state: 'live' };
        proven.add(link.transport);
        watch(link);
        climbLater();
        show('live');
        if (isMany) subs.forEach(subscribe);
        break;
      case 'snapshot': case 'patch': case 'merge':
        if (!isFollower) say({ frame });
        changed(sub, frame);
        break;
      case 'stream_status':
        if (!sub) break;
        sub.upstream = frame;
        isMany ? call(sub.options.onStatus, frame) : show(status.state);
        break;
      case 'unsubscribed':
        if (sub && isMany && frame.reason !== 'requested') refused(sub, { code: frame.reason });
        break;
      case 'reauthenticate': renew(0); break;
      case 'auth_ok':
        expiry(frame.expires_at);
        show(status.state);
        call(options.onPermissions, frame);
        settle(frame.id, undefined, frame);
        break;
      case 'permission_update':
        if (!isFollower) say({ frame });
        call(options.onPermissions, frame);
        break;
      case 'subscribed':
        subs.forEach(sub => {
          if (sub.id !== frame.id) return;
          link.held.set(sub.heldAs = frame.stream, sub);
          if (sub.upstream.state !== 'live') tell(sub, { state: 'live' });
        });
        settle(frame.id, undefined, frame);
        break;
      case 'action_result': settle(frame.id, undefined, frame); break;
      case 'error': {
        const error = failure(frame.error, frame);
        if (frame.id === own || settle(frame.id, error)) break;
        // Without an id it is of a subscription that was confirmed: the server has given it up.
        sub && isMany && frame.id === undefined ? refused(sub, error) : fail(error);
        break;
      }
      case 'reconnect': from.afterMs = directed(frame.after_ms); break;
      case 'close': from.end(frame); break;
    }
  };
  const expiry = at => { link.expiresAt = at == null ? undefined : at / 1000; };

  // ---- transports ----
  const address = (scheme, mine) => {
    const to = new URL(base), { format, select, maxRateMs } = options, { ticket } = mine.credential;
    to.protocol = to.protocol.replace('http', scheme);
    const since = mine.transport !== 'polling' && !isMany && place(subs.get(''));
    for (const [name, value] of Object.entries(isMany ? { ticket } : { format, select, max_rate_ms: maxRateMs, since, ticket }))
      if (value) to.searchParams.set(name, value);
    return to;
  };
  const ask = async (mine, accept, headers) => {
    const { token } = mine.credential;
    mine.heardAt = now();
    const response = await fetch(address('http', mine), {
      headers: { Accept: accept, ...(token && { Authorization: `Bearer ${token}` }), ...headers },
      signal: mine.abort.signal, cache: 'no-store', credentials: 'include',
    });
    mine.heardAt = now();
    return response;
  };
  const problem = async response => {
    const after = response.headers.get('Retry-After');
    const body = await response.json().catch(() => ({}));
    return {
      status: response.status, code: body?.code, reason: body?.detail, isWord: Boolean(body?.code) && response.status !== 426,
      floorMs: directed(/^\d+$/.test(after) ? after * 1000 : Date.parse(after) - (Date.parse(response.headers.get('Date')) || Date.now())),
    };
  };
  const isLogout = ({ code }) => /^(LOGGED_OUT|TOKEN_REVOKED)$/.test(code);
  const open = {
    websocket(mine) {
      const { token } = mine.credential;
      const socket = new WebSocket(address('ws', mine), ['restcast.v1', ...(token ? ['jwt', token] : [])]);
      mine.abort.signal.addEventListener('abort', () => socket.close());
      mine.send = frame => socket.send(JSON.stringify(frame));
      socket.onmessage = event => mine.hear(event.data);
      socket.onclose = ({ code, reason }) => mine.end({ code, reason });
    },
    async sse(mine) {
      const response = await ask(mine, 'text/event-stream');
      if (!response.ok) return mine.end(await problem(response));
      if (!/^text\/event-stream/i.test(response.headers.get('Content-Type'))) return mine.end({ reason: 'not an event stream' });
      const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
      for (let tail = '', data = ''; ;) {
        const { done, value } = await reader.read();
        if (done || tail.length + data.length > EVENT_CHARS_MAX) return mine.end({ code: 1006, reason: done ? '' : 'too large' });
        mine.heardAt = now();
        tail += value;
        if (!value.includes('\n')) continue;
        const lines = tail.split('\n');
        tail = lines.pop();
        for (const line of lines) {
          if (line.startsWith('data:')) data += line.slice(5);
          else if (line.startsWith('retry:')) mine.floorMs = directed(line.slice(6));
          else if (line.length < 2 && data) { mine.hear(data); data = ''; }
        }
      }
    },
    async polling(mine) {
      const sub = subs.get('');
      for (let isWaiting = false; ;) {
        // A ticket is good once.
        if (mine.worked && mine.credential.ticket) await arm(mine, need);
        if (mine.isOver) return;
        const asked = now(), tag = place(sub);
        const response = await ask(mine, 'application/json',
          tag && { 'If-None-Match': `"${tag}"`, ...(isWaiting && { Prefer: `wait=${POLL_S}` }) });
        const why = !response.ok && response.status !== 304 && await problem(response);
        if (why.status === 401 && mine.worked && !isLogout(why)) {
          // The token ended while it was in use: a fresh one, once.
          mine.worked = isWaiting = false;
          await arm(mine, need = 'expired');
          continue;
        }
        if (why) return mine.end(why);
        const data = response.ok ? await response.json() : undefined;
        if (mine.isOver) return;
        if (!mine.upAt) receive({ type: 'welcome', heartbeat_ms: POLL_S * 1000 + (options.maxRateMs ?? 0) }, mine);
        mine.worked = true;
        const state = response.headers.get('X-Restcast-State') ?? 'live';
        if (state !== sub.upstream.state) receive({ type: 'stream_status', state }, mine);
        const [, epoch, seq] = /"(.+)-(\d+)"/.exec(response.headers.get('ETag')) ?? [];
        if (response.ok) receive({ type: 'snapshot', epoch, seq: epoch && +seq, data }, mine);
        // Whoever does not wait, or always has news, is not asked in a tight loop.
        const least = response.ok && epoch ? Math.max(POLL_GAP_MS, options.maxRateMs ?? 0) : isWaiting || !tag ? 1000 : 0;
        isWaiting = true;
        await new Promise(done => { setTimeout(done, asked + least - now()); });
      }
    },
  };

  // ---- a link's life ----
  const start = async (transport = ladder[rung], isUpgrade) => {
    const mine = { transport, abort: new AbortController(), heardAt: now(), held: new Map(), asking: [], turnAt: 0 };
    isUpgrade ? candidate = mine : link = mine;
    mine.drop = () => {
      mine.isOver = true;
      clearTimeout(mine.timer);
      clearTimeout(mine.askTimer);
      mine.abort.abort();
    };
    mine.end = cause => {
      if (mine.isOver) return;
      mine.drop();
      if (mine === link) return ended(mine, cause);
      candidate = undefined;
      // A better one did not come: the next better, if any, or another time.
      const next = ladder.indexOf(transport) + 1;
      next < rung ? start(ladder[next], true) : climbLater(cause.floorMs);
    };
    mine.hear = text => {
      if (mine.isOver) return;
      mine.heardAt = now();
      let frame;
      try { frame = JSON.parse(text); } catch { return mine.end({ code: 1006, reason: 'not JSON', isHasty: true }); }
      receive(frame, mine);
    };
    if (!isUpgrade) show('connecting');
    if (!mine.isOver) await arm(mine, need);
    if (mine.isOver) return;
    mine.timer = setTimeout(() => mine.end({ reason: 'silent' }), transport === 'polling' ? FIRST_POLL_MS : HANDSHAKE_MS);
    try { await open[transport](mine); } catch (error) { mine.end({ code: 1006, reason: error.message }); }
  };
  // Time heals: what held is tried again as if it were the first time.
  const heal = () => { if (link.upAt && now() - link.upAt >= stableMs) attempt = hurried = 0; };
  const promote = () => {
    heal();
    link.drop();
    link = candidate;
    candidate = undefined;
    rung = ladder.indexOf(link.transport);
    upgrades = 0;
  };
  const climbLater = (floorMs = 0) => {
    clearTimeout(upgradeTimer);
    if (rung > 0 && link?.upAt && !candidate)
      upgradeTimer = setTimeout(() => start(ladder[0], true), Math.max(floorMs,
        upgradeMs * (0.5 + Math.random()) * 2 ** Math.min(upgrades++, 4) / (proven.has(ladder[0]) ? 12 : 1)));
  };
  // A WebSocket's pings are hidden from scripts: one that was silent for two of them is asked something.
  const watch = mine => {
    clearTimeout(mine.timer);
    const left = mine.heardAt + 2 * mine.heartbeatMs - now();
    if (mine.isOver || !mine.heartbeatMs) return;
    if (left > 0) mine.timer = setTimeout(watch, left, mine);
    else probe(mine);
  };
  const probe = mine => {
    const asked = now();
    clearTimeout(mine.timer);
    if (!mine.send) return mine.end({ code: 1006, reason: 'heartbeat_timeout' });
    try { mine.send({ type: 'restcast.probe', id: own }); } catch { /* what is closed says so itself */ }
    mine.timer = setTimeout(() => mine.heardAt >= asked ? watch(mine) : mine.end({ code: 1006, reason: 'heartbeat_timeout' }), PROBE_MS);
  };
  const ended = (mine, { code, reason, status: http, isWord, isHasty, floorMs = mine.floorMs ?? 0 }) => {
    clearTimeout(upgradeTimer);
    candidate?.drop();
    candidate = undefined;
    for (const id of [...waiting.keys()]) settle(id, failure('the connection ended first', { code: 'DISCONNECTED' }));
    heal();
    // It was asked for more in a second than it hears.
    if (code === 1008) apartMs = Math.min(ASKED_APART_MAX_MS, apartMs * 2);
    const why = { code: http ?? code, reason: (http && code) || reason };
    const isBottom = rung === ladder.length - 1;
    if ([4003, 4004, 4010].includes(code) || (http >= 400 && http < 500 && ![401, 408, 425, 426, 429].includes(http) && (isWord || isBottom)))
      return stop(why.code, why.reason);
    // What 4010 says on an open connection: in use, or with a fresh credential too.
    if (http === 401 && isLogout({ code }) && (mine.worked || hurried)) return stop(4010, code.toLowerCase());
    const isAuth = code === 4001 || code === 4008 || http === 401;
    // Full jitter; what can be put right at once is tried at once, once.
    const bound = Math.min(backoffMaxMs, (code === 1013 ? 4 : 1) * backoffMs * 2 ** attempt);
    let delay = 0;
    floorMs = mine.afterMs ?? floorMs;
    if (!(isAuth || isHasty) || hurried++) {
      // A server that sends its watchers on spreads them itself; where the next one does too, the back-off holds as well.
      if (mine.afterMs === undefined || attempt || hurried) delay = Math.random() * bound;
      attempt = Math.min(attempt + 1, 20);
    }
    delay = Math.max(delay, floorMs);
    // What does not get through hands over to the next transport: at once where it never did, else after two tries.
    if (!mine.upAt && !isWord && !isAuth && (attempt > 2 || !proven.has(mine.transport))) rung = (rung + 1) % ladder.length;
    floorAt = now() + floorMs;
    if (isAuth) need = 'expired';
    show('waiting', { ...why, retryInMs: delay });
    if (!over.signal.aborted) later(delay);
  };
  const later = ms => {
    clearTimeout(timer);
    timer = setTimeout(start, ms);
  };
  const wake = isOnline => {
    if (isFollower) return;
    if (status.state === 'waiting') {
      if (isOnline) {
        attempt = rung = 0;
        proven.clear();
      }
      later(Math.max(0, floorAt - now()));
    } else if (link?.upAt && !link.isOver && (link.send || now() - link.heardAt > 2 * link.heartbeatMs)) probe(link);
  };
  const rest = () => {
    [timer, upgradeTimer].forEach(clearTimeout);
    for (const one of [link, candidate]) one?.drop();
  };
  const stop = (code, reason, isQuiet) => {
    if (status.state === 'closed') return;
    rest();
    for (const id of [...waiting.keys()]) settle(id, failure('closed', { code: 'CLOSED' }));
    if (!isQuiet) say({ stop: [code, reason] });
    isFollower = true;
    show('closed', { code, reason });
    over.abort();
    queue?.abort();
    release?.();
    channel = channel?.close();
  };
  const forget = () => subs.forEach(sub => { sub.value = sub.at = undefined; });
  const renew = async tries => {
    const mine = link;
    if (isFollower) return say({ renews: true });
    try {
      const fresh = await credential('reauthenticate'), token = fresh.ticket ?? fresh.token;
      if (mine.isOver || !mine.upAt) return;
      if (mine.send) return await request({ type: 'auth_update', token });
      // Polling has it with the next request.
      if (!mine.id) return mine.credential = fresh;
      if (!token) return;
      const to = new URL(base.pathname.replace(/(.*\/v1\/).*/, `$1connections/${mine.id}/auth`), base);
      const response = await fetch(to, {
        method: 'POST', headers: { 'Content-Type': 'application/json' }, body: JSON.stringify({ token }), signal: mine.abort.signal,
      });
      if (!response.ok) throw failure('renewal refused', await problem(response));
      receive({ ...await response.json(), type: 'auth_ok' }, mine);
    } catch (error) {
      if (mine.isOver) return;
      fail(error);
      if (error.code === 'AUTH_SUBJECT_MISMATCH') {
        // Somebody else is signed in: what the one before was shown is not shown on.
        forget();
        say({ gone: true });
        return mine.end({ code: 4001, reason: 'another_subject' });
      }
      if (tries < 2) setTimeout(() => { if (!mine.isOver) renew(tries + 1); }, Math.max(error.floorMs || 0, Math.random() * 1000 * 2 ** tries));
    }
  };
  const send = async action => {
    if (isFollower && channel) return (await request({ send: action, from: me }, say)).result;
    if (!link?.upAt || link.isOver) throw failure('not connected', { code: 'DISCONNECTED' });
    if (!link.send) throw failure('actions need a WebSocket', { code: 'NO_WEBSOCKET' });
    const { status, body } = await request(action);
    return { status, body };
  };

  // ---- many streams: each is asked for, confirmed under the name that the server gives it, left, or given up ----
  const tell = (sub, upstream) => call(sub.options.onStatus, sub.upstream = upstream);
  const isHeld = sub => link?.held.get(sub.heldAs) === sub;
  const lose = sub => { if (isHeld(sub)) link.held.delete(sub.heldAs); };
  // Who says more in a second than the server hears is closed (1008): a few go at once, the others one after the other.
  const demand = (mine, next) => {
    if (next) mine.asking.push(next);
    clearTimeout(mine.askTimer);
    while (!mine.isOver && mine.asking.length) {
      mine.turnAt = Math.max(mine.turnAt, now() - ASKED_AHEAD_MS + apartMs);
      if (mine.turnAt > now()) return mine.askTimer = setTimeout(demand, mine.turnAt - now(), mine);
      mine.turnAt += apartMs;
      mine.asking.shift()();
    }
  };
  const subscribe = sub => {
    const { format, select, maxRateMs } = sub.options, mine = link;
    demand(mine, () => {
      if (subs.get(sub.name) !== sub) return mine.turnAt -= apartMs;
      sub.askedOn = mine;
      request({ type: 'subscribe', stream: sub.name, format, select, since: place(sub), max_rate_ms: maxRateMs, id: sub.id })
        .catch(error => { if (!mine.isOver && subs.get(sub.name) === sub) refused(sub, error); });
    });
  };
  const leave = sub => {
    const mine = sub.askedOn;
    lose(sub);
    sub.askedOn = undefined;
    if (mine) demand(mine, () => mine.send({ type: 'unsubscribe', stream: sub.name, id: own }));
  };
  const again = (sub, ms) => {
    const mine = link;
    clearTimeout(sub.timer);
    sub.timer = setTimeout(() => { if (!mine.isOver && subs.get(sub.name) === sub && !isHeld(sub)) subscribe(sub); }, ms);
  };
  const refused = (sub, error) => {
    const { code } = error, retry_in_ms = backoffMaxMs * Math.random();
    // It is held after all: the answer came too late. Else this connection has it under another spelling of its name.
    if (code === 'ALREADY_SUBSCRIBED' && isHeld(sub)) return;
    lose(sub);
    const isPassing = PASSING.test(code);
    if (isPassing) {
      again(sub, retry_in_ms);
      fail(error);
    } else subs.delete(sub.name);
    tell(sub, isPassing ? { state: sub.value === undefined ? 'failing' : 'stale', code, retry_in_ms } : { state: 'ended', code });
  };

  // ---- tabs: whoever holds the lock has the connection, the others hear of it ----
  const share = () => {
    const name = `restcast ${base} ${JSON.stringify([options.shared, options.format, options.select, options.maxRateMs])}`;
    channel = new BroadcastChannel(name);
    me = crypto.randomUUID();
    const stand = steal => {
      queue?.abort();
      unheard = 0;
      const mine = queue = new AbortController();
      isFollower = true;
      navigator.locks.request(name, steal ? { steal } : { signal: mine.signal }, () => {
        isFollower = false;
        start();
        return new Promise(done => { release = done; });
      }).catch(({ name }) => {
        if (mine !== queue || over.signal.aborted) return;
        rest();
        // Another tab took over, for this one slept; or there are no locks here.
        name === 'AbortError' ? stand() : alone();
      });
    };
    channel.onmessage = ({ data: { hello, at, renews, send: action, from, id, to, answer, frame, status: told, state, gone, stop: end } }) => {
      const sub = subs.get('');
      if (!isFollower) {
        if (hello) say({ to: hello, status, state: sub.at && at !== place(sub) ? { type: 'snapshot', epoch: sub.at[0], seq: sub.at[1], data: sub.value } : undefined });
        if (renews) renew(2);
        if (action) send(action).then(result => ({ result }), ({ message, ...more }) => ({ error: [message, more] }))
          .then(answer => say({ to: from, id, answer }));
        return;
      }
      // What others ask of the leader, or are answered, says nothing of whether it lives.
      if (hello || renews || action || (to && to !== me)) return;
      unheard = 0;
      if (end) return stop(...end, true);
      if (gone) forget();
      if (answer) settle(id, answer.error && failure(...answer.error), answer);
      if (state) { sub.at = undefined; changed(sub, state); }
      if (frame) receive(frame);
      if (told && JSON.stringify(told) !== JSON.stringify(status)) {
        status = told;
        call(options.onStatus, status);
      }
    };
    const hello = () => say({ hello: me, at: place(subs.get('')) });
    stand();
    hello();
    // A leader that sleeps answers nobody: a tab that is looked at takes over.
    const every = setInterval(() => {
      if (!isFollower || globalThis.document?.hidden) unheard = 0;
      else unheard++ < LEADER_ASKED_MAX ? hello() : stand(true);
    }, LEADER_MS);
    over.signal.addEventListener('abort', () => clearInterval(every));
  };
  const alone = () => {
    channel = channel?.close();
    isFollower = false;
    start();
  };

  globalThis.addEventListener?.('online', () => wake(true), { signal: over.signal });
  globalThis.document?.addEventListener('visibilitychange', () => document.hidden || wake(false), { signal: over.signal });
  if (!isMany) subs.set('', subscription('', options));
  // Where there are no locks or channels, or no leave to use them: by itself.
  try { options.shared && !isMany ? share() : alone(); } catch { alone(); }

  return {
    get value() { return subs.get('')?.value; },
    get at() { return place(subs.get('')); },
    get status() { return status; },
    get state() { return status.state; },
    get transport() { return status.transport; },
    send,
    renew: () => renew(2),
    close: () => stop(1000, 'closed', true),
    subscribe(stream, options = {}) {
      if (!isMany || subs.has(stream)) throw failure('no second stream here', { code: isMany ? 'ALREADY_SUBSCRIBED' : 'BAD_REQUEST' });
      const sub = subscription(stream, options);
      subs.set(stream, sub);
      if (link?.upAt && !link.isOver) subscribe(sub);
      return {
        get value() { return sub.value; },
        get at() { return place(sub); },
        close() {
          if (subs.get(stream) !== sub) return;
          subs.delete(stream);
          leave(sub);
        },
      };
    },
  };
}
