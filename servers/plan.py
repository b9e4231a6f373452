"""`python -m servers.plan`: answers the router's question which model should be warm where; seconds of computing, away from the loop.

Decides nothing. It reads a `core.advice.Question` in MessagePack and prints the plan, and what it rests on, as JSON.
"""

import sys

import msgspec

from core.advice import Question
from servers.aside import asked


def answer(data: bytes) -> bytes:
    """The plan to a question, as it is shown."""
    question = msgspec.msgpack.decode(data, type=Question)
    plan = question.answer()
    return msgspec.json.encode({**msgspec.structs.asdict(plan), "rates_per_s": question.rates_per_s, "memory_guessed": question.guessed})


if __name__ == "__main__":
    sys.stdout.buffer.write(answer(asked()))
