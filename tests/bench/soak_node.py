"""A node for the soak: `python -m tests.bench.soak_node PORT SEED MODEL`. Answers most requests well, some by dice with 503, 500 or a cut.

Each answer is as long and as quick as the prompt asks (`tokens=20 rate=100`). Knows nothing of the router.
"""

import json
import random
import re
import sys
from functools import partial

import trio

from tests.bench.streamer import lists
from tests.fleet.rawhttp import Caller, Hangup, RawServer, Reset

FAULTS = {"503": 0.02, "500": 0.01, "cut": 0.015, "reset": 0.01, "slow": 0.02}
"""How often; the rest is answered well."""
SLOW_S = 2.0
TOKENS, RATE = 10, 200.0
_WISHES = re.compile(rb"tokens=(\d+) rate=([\d.]+)")


def _drawn(dice: random.Random) -> str:
    at = dice.random()
    for fault, share in FAULTS.items():
        at -= share
        if at < 0:
            return fault
    return ""


def line(content: str, *, done: bool = False) -> bytes:
    """One line of a chat answer."""
    made = {"model": "m", "created_at": "2026-01-01T00:00:00Z", "message": {"role": "assistant", "content": content}, "done": done}
    return json.dumps({**made, **({"done_reason": "stop", "total_duration": 1000, "eval_count": 3} if done else {})}).encode() + b"\n"


def event(content: str) -> bytes:
    """One event of an OpenAI stream."""
    choice = {"index": 0, "delta": {"role": "assistant", "content": content}, "finish_reason": None}
    made = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 1, "model": "m", "choices": [choice]}
    return b"data: " + json.dumps(made).encode() + b"\n\n"


async def answer(caller: Caller, *, dice: random.Random, known: dict[bytes, bytes]) -> None:
    """One request."""
    if (told := known.get(caller.target.encode())) is not None:
        await caller.answer(told)
        return
    fault = _drawn(dice)
    if fault in ("503", "500"):
        await caller.answer(json.dumps({"error": "server busy" if fault == "503" else "an error of this node"}).encode(), status=int(fault))
        return
    wishes = _WISHES.search(caller.body)
    tokens, rate = (int(wishes[1]), float(wishes[2])) if wishes is not None else (TOKENS, RATE)
    if fault == "slow":
        await trio.sleep(SLOW_S)
    if caller.target == "/api/embed":
        await caller.answer(json.dumps({"model": "m", "embeddings": [[0.1] * 64], "prompt_eval_count": 3}).encode())
        return
    if not json.loads(caller.body).get("stream", True):
        await trio.sleep(tokens / rate)
        await caller.answer(line("word " * tokens, done=True).rstrip())
        return
    events = caller.target.startswith("/v1/")
    await caller.begin_chunks("text/event-stream" if events else "application/x-ndjson")
    for number in range(tokens):
        await caller.chunk(event(f" {number}") if events else line(f" {number}"))
        await trio.sleep(1 / rate)
        if number == tokens // 2 and fault:
            raise Reset if fault == "reset" else Hangup
    await caller.chunk(b"data: [DONE]\n\n" if events else line("", done=True))
    await caller.end_chunks()


def main() -> None:
    node = RawServer(partial(answer, dice=random.Random(int(sys.argv[2])), known=lists(sys.argv[3])))
    node.port = int(sys.argv[1])
    trio.run(node.run)


if __name__ == "__main__":
    main()
