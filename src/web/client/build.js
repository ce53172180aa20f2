// Makes client.min.js of client.js, and writes at its top of which source it was made: a test of restcast compares.
import { createHash } from 'node:crypto';
import { readFileSync, writeFileSync } from 'node:fs';
import { minify } from 'terser';

const at = name => new URL(name, import.meta.url);
const source = readFileSync(at('client.js'), 'utf8');
const hash = createHash('sha256').update(source).digest('hex');
// Members that no frame, option or answer has: what a connection or subscription knows of itself.
const own = /^(isOver|upAt|heardAt|heartbeatMs|afterMs|floorMs|isHasty|isWord|isLost|worked|credential|held|heldAs|asking|askedOn|askTimer|turnAt|gapAt)$/;
const { code } = await minify(source, {
  module: true, compress: { passes: 3, ecma: 2020 }, mangle: { properties: { regex: own } }, format: { comments: false },
});
writeFileSync(at('client.min.js'), `// restcast's browser client. SPDX-License-Identifier: MIT OR Apache-2.0. Made of client.js, sha256 ${hash}\n${code}\n`);
