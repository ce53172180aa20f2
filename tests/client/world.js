// A world for the client library: a clock that moves when told, dice that fall as told, sockets and answers by script.

const immediate = setImmediate;

export class World {
  static WebSocketMissing = false;
  now = 1000;
  timers = [];
  sockets = [];
  requests = [];
  chance = 0.5;
  /** What `fetch` answers: a function of the request that gives a Response, or throws. */
  answer = () => { throw new TypeError('unreachable'); };

  constructor() {
    const world = this;
    let last = 0;
    this.windowEvents = new EventTarget();
    this.document = Object.assign(new EventTarget(), { hidden: false });
    const replaced = {
      setTimeout: (run, ms = 0, ...values) => {
        const id = { number: ++last, at: world.now + (ms > 0 ? ms : 0), run: () => run(...values) };
        world.timers.push(id);
        return id;
      },
      clearTimeout: id => { world.timers = world.timers.filter(timer => timer !== id); },
      setInterval: (run, ms) => {
        const id = { number: ++last, at: world.now + ms, run: () => { id.at += ms; world.timers.push(id); run(); } };
        world.timers.push(id);
        return id;
      },
      clearInterval: id => { world.timers = world.timers.filter(timer => timer !== id); },
      performance: { now: () => world.now },
      document: this.document,
      addEventListener: (...values) => world.windowEvents.addEventListener(...values),
      fetch: async (url, init) => {
        const request = { url: String(url), at: world.now, ...init };
        world.requests.push(request);
        const answer = await world.answer(request);
        init.signal.throwIfAborted();
        return answer;
      },
      WebSocket: class {
        constructor(url, protocols) {
          if (World.WebSocketMissing) throw new ReferenceError('WebSocket is not defined');
          Object.assign(this, { url: String(url), protocols, at: world.now, sent: [] });
          world.sockets.push(this);
        }
        send(text) { this.sent.push(JSON.parse(text)); }
        close() { this.isClosed = true; }
        says(frame) { this.onmessage?.({ data: JSON.stringify(frame) }); }
        welcomes(more) { this.says({ type: 'welcome', connection: 'c_1', auth: { type: 'jwt', expires_at: null }, heartbeat_ms: 25000, ...more }); }
        ends(code, reason = '') { this.onclose?.({ code, reason }); }
      },
    };
    this.original = {};
    this.replace({ ...replaced, navigator: {} });
    this.random = Math.random;
    Math.random = () => world.chance;
  }

  replace(values) {
    for (const [name, value] of Object.entries(values)) {
      if (!(name in this.original)) this.original[name] = Object.getOwnPropertyDescriptor(globalThis, name);
      Object.defineProperty(globalThis, name, { value, configurable: true, writable: true });
    }
  }

  /** From now on there are tabs: every `connect` is one, with channels and locks between them. */
  tabs() {
    const world = this, channels = [], locks = new Map();
    this.isDeaf = undefined;            // the number of the tab that hears nothing, and so answers nobody
    const grant = name => {
      const lock = locks.get(name);
      if (lock.holder || !lock.queue.length) return;
      const next = lock.holder = lock.queue.shift();
      Promise.resolve(next.run()).then(next.resolve).finally(() => { if (lock.holder === next) { lock.holder = undefined; grant(name); } });
    };
    this.replace({
      BroadcastChannel: class {
        constructor(name) { this.name = name; this.number = channels.push(this) - 1; }
        postMessage(message) {
          if (this.isClosed) throw new DOMException('closed', 'InvalidStateError');
          for (const to of channels)
            if (to !== this && to.name === this.name && !to.isClosed && to.number !== world.isDeaf) {
              const data = structuredClone(message);
              Promise.resolve().then(() => { if (!to.isClosed) to.onmessage?.({ data }); });
            }
        }
        close() { this.isClosed = true; }
      },
      navigator: { locks: { request: (name, { signal, steal }, run) => new Promise((resolve, reject) => {
        if (!locks.has(name)) locks.set(name, { queue: [] });
        const lock = locks.get(name), one = { run, resolve, reject };
        const abort = () => reject(new DOMException('aborted', 'AbortError'));
        if (steal) {
          lock.holder?.reject(new DOMException('stolen', 'AbortError'));
          lock.holder = undefined;
          lock.queue.unshift(one);
        } else lock.queue.push(one);
        signal?.addEventListener('abort', () => {
          if (lock.queue.includes(one)) { lock.queue.splice(lock.queue.indexOf(one), 1); abort(); }
        });
        grant(name);
      }) } },
    });
  }

  end() {
    Math.random = this.random;
    for (const [name, was] of Object.entries(this.original)) if (was) Object.defineProperty(globalThis, name, was); else delete globalThis[name];
  }

  /** Lets promises run. */
  async settle() { for (let i = 0; i < 6; i++) await new Promise(done => immediate(done)); }

  /** Moves the clock, running what is due in its order. */
  async pass(ms) {
    const until = this.now + ms;
    await this.settle();
    for (;;) {
      const due = this.timers.filter(timer => timer.at <= until).sort((a, b) => a.at - b.at || a.number - b.number)[0];
      if (!due) break;
      this.timers = this.timers.filter(timer => timer !== due);
      this.now = Math.max(this.now, due.at);
      due.run();
      await this.settle();
    }
    this.now = until;
    await this.settle();
  }

  get socket() { return this.sockets.at(-1); }
}

/** An answer of restcast's that refuses. */
export const problem = (status, code, headers = {}) =>
  new Response(JSON.stringify({ status, code, detail: 'refused' }), { status, headers: { 'Content-Type': 'application/problem+json', ...headers } });

/** An event stream that a test writes. */
export function events() {
  let writer;
  const body = new ReadableStream({ start(controller) { writer = controller; } });
  const bytes = new TextEncoder();
  return {
    response: new Response(body, { headers: { 'Content-Type': 'text/event-stream' } }),
    writes: text => writer.enqueue(bytes.encode(text)),
    says(frame) { this.writes(`event: ${frame.type}\ndata: ${JSON.stringify(frame)}\n\n`); },
    ends: () => writer.close(),
  };
}
