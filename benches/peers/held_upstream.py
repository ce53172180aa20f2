#!/usr/bin/env python3
"""A REST upstream that says when its streams change, to the millisecond: it holds each answer until then.

    python3 held_upstream.py --streams 8 --interval 300 --bytes 128 --burst

Streams are /0, /1 …; each changes once in `--interval` milliseconds: with --burst all in one instant, otherwise evenly
spread over it. A poller's own phase so plays no part. `measure.py` starts it for the burst of m5; it prints a ready line.
Memory: one request head a connection, within asyncio's limit, and a count a stream. Errors: a request that is none ends its connection.
"""

import argparse
import asyncio
import json
import os


def body(number, size):
    text = f'{{"n":{number},"pad":"'
    return (text + "x" * max(0, size - len(text) - 2) + '"}').encode()


async def serve(reader, writer, args, changes):
    loop, interval = asyncio.get_running_loop(), args.interval / 1000
    try:
        while True:
            head = await reader.readuntil(b"\r\n\r\n")
            stream = int(head.split(b" ", 2)[1].lstrip(b"/")) % args.streams
            offset = 0 if args.burst else stream / args.streams * interval
            now = loop.time()
            # The first answer comes at once: a value to begin with.
            if stream in changes:
                await asyncio.sleep(interval - (now - offset) % interval)
            changes[stream] = changes.get(stream, 0) + 1
            content = body(changes[stream], args.bytes)
            answer = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(content)
            writer.write(answer + content)
            await writer.drain()
    except (asyncio.IncompleteReadError, asyncio.LimitOverrunError, ConnectionError, ValueError, IndexError):
        writer.close()


async def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--streams", type=int, default=8)
    parser.add_argument("--interval", type=int, default=300, help="milliseconds [%(default)s]")
    parser.add_argument("--bytes", type=int, default=128, help="of a body [%(default)s]")
    parser.add_argument("--burst", action="store_true")
    args = parser.parse_args()
    if args.streams < 1 or args.interval < 1:
        parser.error("--streams and --interval are at least 1")
    changes = {}  # by stream
    server = await asyncio.start_server(lambda *ends: serve(*ends, args, changes), "127.0.0.1", 0)
    host, port = server.sockets[0].getsockname()
    print(json.dumps({"ready": True, "listen": f"{host}:{port}", "pid": os.getpid()}), flush=True)
    await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(main())
