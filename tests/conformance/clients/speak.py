"""How a program of this directory talks to the test that started it: one JSON line per question and answer.

A program declares cases with `@case(route, what)` and ends with `serve()`. The test asks `{"route", "what", "url"}`; the answer is
`{"value": ...}`, or `{"failure": text}` when the case itself failed. `speak.mjs` is the same in JavaScript. Runs in the clients' own
environment, so it imports nothing of the project.
"""

import dataclasses
import json
import sys
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

COMMON = json.loads(Path(__file__).with_name("common.json").read_text(encoding="utf-8"))
MODELS: dict[str, str] = COMMON["models"]
WEATHER = {"type": "function", "function": COMMON["weather"]}
CASES: dict[tuple[str, str], Callable[[str], Any]] = {}


def case(route: str, what: str) -> Callable[[Callable[[str], Any]], Callable[[str], Any]]:
    """Declare what a client does on `route` of the server at the URL that it gets."""

    def declare(run: Callable[[str], Any]) -> Callable[[str], Any]:
        assert (route, what) not in CASES, f"{route}, {what} stands twice"
        CASES[route, what] = run
        return run

    return declare


def parts_until(parts: Iterable[Any], count: int) -> list[Any]:
    """The first `count` of `parts`."""
    return [part for _, part in zip(range(count), parts, strict=False)]


def refused(call: Callable[[], Any], *kinds: type[Exception]) -> dict[str, Any]:
    """The error that `call` ends with, as the client's user sees it."""
    try:
        call()
    except kinds as error:
        status = getattr(error, "status_code", None)
        return {"error": type(error).__name__, "status": status, "text": str(error)}
    raise AssertionError("no error")


def noticed(stream: Callable[[], Iterable[Any]], bad: Callable[[Any], str] = lambda part: "") -> dict[str, Any]:
    """What a client says when its stream breaks: the error, or the part that `bad` names as one, and how many good parts came before.

    "" when it takes what came for a whole answer.
    """
    seen = 0
    try:
        for part in stream():
            if told := bad(part):
                return {"noticed": told, "text": str(part)[:300], "seen": seen}
            seen += 1
    except Exception as error:
        return {"noticed": type(error).__name__, "text": str(error)[:300], "seen": seen}
    return {"noticed": "", "seen": seen}


def plain(value: Any) -> Any:
    """`value` as JSON can say it."""
    if hasattr(value, "model_dump"):
        return value.model_dump(mode="json")
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    return str(value)


def serve() -> None:
    """Answer questions until there are no more. Whatever a library prints goes to standard error."""
    out, sys.stdout = sys.stdout, sys.stderr
    for line in sys.stdin:
        asked = json.loads(line)
        try:
            answer = {"value": CASES[asked["route"], asked["what"]](asked["url"])}
        except Exception:
            answer = {"failure": traceback.format_exc()}
        print(json.dumps(answer, default=plain), file=out, flush=True)
