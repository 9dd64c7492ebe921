"""A client of many streams that costs little, in a process of its own: reads a JSON request, prints JSON figures.

{"port", "bodies": [...]} -> {"seconds", "first_ms": [of a stream], "between_ms": [of a token], "texts": [...]}
"""

import asyncio
import json
import sys
import time
from itertools import pairwise

END = b"data: [DONE]"


async def stream(port: int, body: bytes) -> tuple[float, list[float], bytes]:
    """When it was sent, when events of text came, and all bytes."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    kind = f"Content-Type: application/json\r\nContent-Length: {len(body)}"
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: a\r\n{kind}\r\nConnection: close\r\n\r\n"
    begun_s = time.perf_counter()
    writer.write(head.encode() + body)
    times, parts = [], []
    while part := await reader.read(65536):
        times += [time.perf_counter()] * part.count(b'"delta":{"content"')
        parts.append(part)
    writer.close()
    said = b"".join(parts)
    assert END in said, said[-300:]
    return begun_s, times, said


def text(said: bytes) -> str:
    chunks = [json.loads(line[6:]) for line in said.split(b"\n") if line.startswith(b"data: {")]
    return "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks if chunk["choices"])


async def run(asked: dict) -> dict:
    begun_s = time.perf_counter()
    answers = await asyncio.gather(*(stream(asked["port"], json.dumps(body).encode()) for body in asked["bodies"]))
    return {
        "seconds": time.perf_counter() - begun_s,
        "first_ms": [1e3 * (times[0] - begun_s) for begun_s, times, _ in answers],
        "between_ms": between_ms([times for _, times, _ in answers]),
        "texts": [text(said) for _, _, said in answers],
    }


def between_ms(streams: list[list[float]]) -> list[float]:
    """Milliseconds from token to token while all streams run."""
    first, last = max(times[0] for times in streams), min(times[-1] for times in streams)
    return [1e3 * (b - a) for times in streams for a, b in pairwise(times) if first <= a and b <= last]


if __name__ == "__main__":
    print(json.dumps(asyncio.run(run(json.load(sys.stdin)))))
