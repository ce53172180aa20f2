// A page without a browser: the client library in Node, told what to do by lines of JSON and telling what it sees.
// `node live.js MODULE`: {"connect": {url, options, mint: {secret, kid, claims, life}}}, {"send": …}, {"renew": true},
// {"subscribe": …}, {"close": true}; the tokens are made here, as often as they are asked for.
import { createHmac } from 'node:crypto';
import { createInterface } from 'node:readline';

const { connect } = await import(process.argv[2]);
const tell = event => process.stdout.write(`${JSON.stringify(event)}\n`);
const base64url = value => Buffer.from(JSON.stringify(value)).toString('base64url');
function token({ secret, kid, claims, life }) {
  const now = Math.floor(Date.now() / 1000);
  const text = `${base64url({ alg: 'HS256', kid })}.${base64url({ iat: now, exp: now + life, ...claims })}`;
  return `${text}.${createHmac('sha256', secret).update(text).digest('base64url')}`;
}
const heard = stream => ({
  onValue: (value, { type, seq, ts }) => tell({ value, type, seq, ts, at: (streams.get(stream) ?? connection)?.at, stream }),
  onPatch: patch => tell({ patch, stream }),
});

let connection, minted, refuses = [];
const streams = new Map();
const deeds = {
  connect({ url, options, mint, refuses: reasons = [] }) {
    refuses = reasons;
    minted = mint;
    connection = connect(url, {
      getToken: mint && (({ reason }) => {
        tell({ asked: reason });
        if (refuses.includes(reason)) throw Object.assign(new Error('nobody is signed in'), { code: 'NO_TOKEN' });
        return token(mint);
      }),
      ...heard(),
      onStatus: status => tell({ status }),
      onPermissions: ({ permissions, roles }) => tell({ permissions, roles }),
      onError: ({ code, message }) => tell({ error: { code, message } }),
      ...options,
    });
  },
  send: action => connection.send(action).then(result => tell({ result }), ({ code, message, ...more }) => tell({ refused: { code, message, ...more } })),
  renew: () => connection.renew(),
  sub: sub => { minted.claims.sub = sub; },
  subscribe: ({ stream, options }) =>
    streams.set(stream, connection.subscribe(stream, { ...heard(stream), onStatus: upstream => tell({ upstream, stream }), ...options })),
  unsubscribe: stream => { streams.get(stream).close(); streams.delete(stream); },
  close: () => connection.close(),
};
tell({ ready: true });
for await (const line of createInterface({ input: process.stdin })) {
  const [[deed, detail]] = Object.entries(JSON.parse(line));
  deeds[deed](detail);
}
process.exit();
