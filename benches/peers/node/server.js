// Node's `ws`: one process, the message turned into bytes once, `send` on every client.
//
// Source: the flags and the message of README.md in the folder above.
// Tuned: no compression, no client tracking set to walk beside our own array, TCP_NODELAY (the library's default), a Buffer
// so that no client's send encodes the text again, UTF-8 checks of received text off, the answer to an upgrade and what
// greets the client corked into one write.
// Errors: a client with over a megabyte unsent is terminated.

import { createHmac, timingSafeEqual } from 'node:crypto';
import { readFileSync } from 'node:fs';
import { createServer } from 'node:http';
import { parseArgs } from 'node:util';
import { WebSocketServer } from 'ws';

const BACKLOG = 4096;
const LEEWAY_S = 5;
const UNSENT_BYTES_MAX = 1 << 20;
const WELCOME = Buffer.from(
  '{"type":"welcome","connection":"c_0000000000000000","auth":{"type":"jwt","sub":"u0000000","expires_at":1800000000000000},"heartbeat_ms":25000}',
);

const { values: flags } = parseArgs({
  options: {
    port: { type: 'string', default: '0' },
    bytes: { type: 'string', default: '128' },
    interval: { type: 'string', default: '1000' },
    secret: { type: 'string' },
  },
});
const intervalMs = Number(flags.interval);
const messageBytes = Number(flags.bytes);
if (!(intervalMs >= 0) || !(messageBytes >= 64 && messageBytes <= 1 << 20)) {
  console.error('ws: --interval or --bytes is out of range');
  process.exit(2);
}
if (flags.secret !== undefined && intervalMs > 0) {
  // The value that greets would not be the newest.
  console.error('ws: --secret greets and does not broadcast: it goes with --interval 0');
  process.exit(2);
}
const secret = flags.secret === undefined ? null : readFileSync(flags.secret, 'utf8').replace(/\n$/, '');

function accepts(authorization) {
  if (!authorization?.startsWith('Bearer ')) return false;
  const [header, payload, signature, ...rest] = authorization.slice(7).split('.');
  if (signature === undefined || rest.length > 0) return false;
  const made = createHmac('sha256', secret).update(`${header}.${payload}`).digest();
  const given = Buffer.from(signature, 'base64url');
  if (given.length !== made.length || !timingSafeEqual(given, made)) return false;
  try {
    const { alg } = JSON.parse(Buffer.from(header, 'base64url'));
    const { exp } = JSON.parse(Buffer.from(payload, 'base64url'));
    return alg === 'HS256' && typeof exp === 'number' && Date.now() / 1000 < exp + LEEWAY_S;
  } catch {
    return false;
  }
}

const clients = new Set();
const websockets = new WebSocketServer({
  noServer: true,
  clientTracking: false,
  perMessageDeflate: false,
  skipUTF8Validation: true,
  maxPayload: 16 << 10,
});
const server = createServer((_, response) => response.writeHead(404).end());
server.on('upgrade', (request, socket, head) => {
  if (request.url !== '/ws') {
    socket.end('HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\nConnection: close\r\n\r\n');
    return;
  }
  if (secret !== null && !accepts(request.headers.authorization)) {
    socket.end('HTTP/1.1 401 Unauthorized\r\nContent-Length: 0\r\nConnection: close\r\n\r\n');
    return;
  }
  socket.cork();
  websockets.handleUpgrade(request, socket, head, (client) => {
    clients.add(client);
    client.on('close', () => clients.delete(client));
    client.on('error', () => client.terminate());
    if (secret !== null) {
      client.send(WELCOME, { binary: false });
      client.send(value, { binary: false });
    }
  });
  socket.uncork();
});

let seq = 0;
function message() {
  seq += 1;
  const ts = Math.floor((performance.timeOrigin + performance.now()) * 1000);
  const head = `{"ts":${ts},"seq":${seq},"pad":"`;
  return Buffer.from(`${head}${'x'.repeat(Math.max(0, messageBytes - head.length - 2))}"}`);
}

// What greets a client whose token was checked, behind the welcome.
const value = secret === null ? null : message();

function broadcast() {
  const bytes = message();
  for (const client of clients) {
    if (client.bufferedAmount > UNSENT_BYTES_MAX) client.terminate();
    else client.send(bytes, { binary: false });
  }
}

// On a fixed grid: a late server skips the places that it missed.
let due = performance.now() + intervalMs;
function tick() {
  broadcast();
  const now = performance.now();
  due += intervalMs * (Math.floor(Math.max(0, now - due) / intervalMs) + 1);
  setTimeout(tick, Math.max(0, due - now));
}

server.listen({ host: '127.0.0.1', port: Number(flags.port), backlog: BACKLOG }, () => {
  if (intervalMs > 0) setTimeout(tick, intervalMs);
  const { address, port } = server.address();
  console.log(JSON.stringify({ ready: true, listen: `${address}:${port}`, pid: process.pid }));
});
