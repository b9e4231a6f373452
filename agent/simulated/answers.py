"""What a simulated model says, and how Ollama writes it down.

Decides tokens, vectors, tool calls and JSON; never when they come. Everything follows from (model, prompt, seed): two nodes
with one model and one seed say the same, and a mixed-up stream is found out by its text.

The rules of the game:
* An answer is `num_predict` words long and ends with `length`; without a limit it is 12 to 59 words and ends with `stop`.
* A thinking model thinks for six words first, unless told not to.
* A model with tools, given some, calls each function that the last user message names by a word of its name (four letters or
  more), with arguments made from that message. A result from a tool is answered with words.
* `format` gives the smallest JSON that fits.
* Words that were put into its mouth (a last message of its own) are gone on from: what it would have said after them, if it would have
  said them; else something new.
"""

import hashlib
import json
import random
import re
import struct
import time
from collections.abc import Sequence
from email.utils import formatdate
from typing import Any, Final

import msgspec

from agent.simulated.models import SimulatedModel

CONSONANTS: Final = "bcdfghlmnprstv"
VOWELS: Final = "aeiou"
THINKING_WORDS: Final = 6
CALL_TOKEN: Final = "<tool_call>"
"""What a token of a tool call reads like in `logprobs`."""
LONGEST_ANSWER: Final = 100_000
JSON_TOKEN: Final = re.compile(r"\w+|.", re.DOTALL)
ESCAPES: Final = {ord("<"): "\\u003c", ord(">"): "\\u003e", ord("&"): "\\u0026", 0x2028: "\\u2028", 0x2029: "\\u2029"}
MICROSECOND_NS: Final = 1000


class Piece(msgspec.Struct, frozen=True, gc=False):
    """What one token adds. A token of a tool call adds nothing before the last."""

    content: str = ""
    thinking: str = ""
    calls: tuple[dict[str, Any], ...] = ()

    @property
    def silent(self) -> bool:
        """Whether nothing is sent for it."""
        return not (self.content or self.thinking or self.calls)


class Question(msgspec.Struct, frozen=True, kw_only=True):
    """What an answer depends on."""

    model: SimulatedModel
    prompt: str  # everything the model reads
    last_message: str = ""  # the last user message; empty when the last message is not a user's
    begun: str = ""  # what the model has said already: the last message is its own
    seed: int | None = None
    limit: int | None = None
    stop: tuple[str, ...] = ()
    think: bool = False
    tools: tuple[dict[str, Any], ...] = ()
    schema: Any = None  # "json", a JSON schema, or None


def go_json(value: Any) -> bytes:
    """`value` as Go's encoder writes it."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).translate(ESCAPES).encode("utf-8", "replace")


def go_time(wall_ns: int) -> str:
    """UTC, RFC 3339, up to nine fractional digits, trailing zeros dropped."""
    seconds, rest = divmod(wall_ns, 1_000_000_000)
    fraction = f".{rest:09d}".rstrip("0") if rest else ""
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(seconds)) + fraction + "Z"


def http_date(wall_ns: int) -> bytes:
    """The value of a `Date` header."""
    return formatdate(wall_ns / 1e9, usegmt=True).encode()


def dice_for(*parts: object) -> random.Random:
    """A generator that depends on `parts` alone."""
    return random.Random(hashlib.sha256("\0".join(map(str, parts)).encode("utf-8", "replace")).digest())


def _vocabulary() -> list[str]:
    syllables = [consonant + vowel for consonant in CONSONANTS for vowel in VOWELS]
    pairs = [first + second for first in syllables for second in syllables]
    return [" " + word for word in (*syllables, *pairs)]


VOCABULARY: Final = _vocabulary()
"""Made-up words, each with its leading space."""


def answer(question: Question, *, usual_tokens: int | None = None) -> tuple[list[Piece], str]:
    """The tokens of the answer and the `done_reason`. `usual_tokens` is its length when nothing limits it."""
    if question.begun:
        return _gone_on(question, usual_tokens)
    dice = dice_for(question.model.name.lower(), question.prompt, question.seed)
    pieces: list[Piece] = []
    if question.think:
        pieces = [Piece(thinking=word) for word in dice.choices(VOCABULARY, k=THINKING_WORDS)]
    bounded = True
    if question.schema is not None:
        text = json.dumps(fitting(question.schema, dice))
        pieces += [Piece(content=token) for token in JSON_TOKEN.findall(text)]
    elif calls := tool_calls(question, dice):
        for call in calls:
            pieces += [Piece()] * 5 + [Piece(calls=(call,))]
    else:
        bounded = question.limit is None
        length = (usual_tokens or 12 + dice.randrange(48)) if question.limit is None else max(0, question.limit - len(pieces))
        said = [Piece(content=word) for word in dice.choices(VOCABULARY, k=min(length, LONGEST_ANSWER))]
        pieces += _stopped(said, question.stop)
        bounded = bounded or len(pieces) < (question.limit or 0)
    if question.limit is not None and (not bounded or len(pieces) > question.limit):
        return pieces[: question.limit], "length"
    return pieces, "stop"


def _gone_on(question: Question, usual_tokens: int | None) -> tuple[list[Piece], str]:
    """The rest of an answer that was begun."""
    begun, limit = question.begun, question.limit
    said = begun.count(" ")  # each word has one before it
    whole = msgspec.structs.replace(question, begun="", think=False, limit=None if limit is None else limit + said)
    pieces, reason = answer(whole, usual_tokens=usual_tokens)
    if "".join(piece.content for piece in pieces[:said]) == begun:
        return pieces[said:], reason
    other = msgspec.structs.replace(question, begun="", prompt=f"{question.prompt}\nassistant: {begun}")
    return answer(other, usual_tokens=usual_tokens)


def _stopped(pieces: list[Piece], stops: tuple[str, ...]) -> list[Piece]:
    """`pieces` up to the first of `stops`, which is not said."""
    text = "".join(piece.content for piece in pieces)
    ends = [at for stop in stops if stop and (at := text.find(stop)) >= 0]
    if not ends:
        return pieces
    left = min(ends)
    kept: list[Piece] = []
    for piece in pieces:
        if left <= 0:
            break
        kept.append(Piece(content=piece.content[:left]))
        left -= len(piece.content)
    return kept


def call_id(dice: random.Random) -> str:
    """What a call is known by."""
    return "call_" + "".join(dice.choice("abcdefghijklmnopqrstuvwxyz0123456789") for _ in range(8))


def tool_calls(question: Question, dice: random.Random) -> list[dict[str, Any]]:
    """The calls that the last user message asks for, in the order of the tools."""
    said = question.last_message.lower()
    calls: list[dict[str, Any]] = []
    for tool in question.tools:
        function = tool.get("function") or {}
        name = str(function.get("name", ""))
        if any(len(word) >= 4 and word in said for word in re.split(r"[^a-z]+", name.lower())):
            schema = function.get("parameters")
            arguments = fitting(schema, dice, question.last_message) if isinstance(schema, dict) else {}
            calls.append({"id": call_id(dice), "function": {"index": len(calls), "name": name, "arguments": arguments}})
    return calls


def fitting(schema: Any, dice: random.Random, said: str = "", depth: int = 8) -> Any:
    """The smallest value that fits a JSON schema; strings are the last capitalised word of `said`, or made up."""
    if schema == "json":
        return {"answer": dice.choice(VOCABULARY).strip()}
    if not isinstance(schema, dict) or depth == 0:
        return None
    if isinstance(choices := schema.get("enum"), list) and choices:
        return choices[0]
    if "const" in schema:
        return schema["const"]
    kind = schema.get("type", "object" if "properties" in schema else "string")
    if isinstance(kind, list):
        kind = kind[0] if kind else "string"
    if kind == "object":
        properties = schema.get("properties")
        names = properties if isinstance(properties, dict) else {}
        return {name: fitting(value, dice, said, depth - 1) for name, value in names.items()}
    if kind == "array":
        return [fitting(schema.get("items", {"type": "string"}), dice, said, depth - 1)]
    if kind in ("integer", "number"):
        return dice.randrange(1, 100)
    if kind == "boolean":
        return True
    if kind == "null":
        return None
    capitalised = re.findall(r"\b[A-Z]\w+", said)
    return capitalised[-1] if capitalised else dice.choice(VOCABULARY).strip()


def vector(model: SimulatedModel, text: str, dimensions: int | None) -> list[float]:
    """A vector of length 1 that depends on (model, text), with six decimals, so that single precision writes it alike."""
    dice = dice_for(model.name.lower(), text, "vector")
    length = min(dimensions or model.embedding_length, model.embedding_length)
    raw = [dice.uniform(-1, 1) for _ in range(length)]
    norm = sum(value * value for value in raw) ** 0.5
    return [round(value / norm, 6) for value in raw]


def as_double(value: float) -> float:
    """`value` after a stay in single precision, as `/api/embeddings` shows it."""
    return float(struct.unpack("<f", struct.pack("<f", value))[0])


def logprob(token: str, top: int) -> dict[str, Any]:
    """One entry of `logprobs`. `top` alternatives, the token itself first."""
    dice = dice_for(token, "logprob")
    own_logprob = round(-3 * dice.random(), 6)
    own = {"token": token, "logprob": own_logprob, "bytes": list(token.encode())}
    if not top:
        return own
    others = [
        {"token": other, "logprob": own_logprob - at - 1, "bytes": list(other.encode())}
        for at, other in enumerate(dice.choices(VOCABULARY, k=top - 1))
    ]
    return {**own, "top_logprobs": [dict(own), *others]}


def logprobs(pieces: Sequence[Piece], top: int) -> list[dict[str, Any]]:
    """`logprobs` of some tokens."""
    return [logprob(piece.content or piece.thinking or CALL_TOKEN, top) for piece in pieces]


def token_ids(text: str, count: int) -> list[int]:
    """`count` numbers for generate's `context`."""
    dice = dice_for(text, "context")
    return [dice.randrange(1759, 1834) for _ in range(count)]


def whole_microseconds(seconds: float) -> int:
    """`seconds` in nanoseconds as the runner gives them: whole microseconds, never none."""
    return max(1, round(seconds * 1e6)) * MICROSECOND_NS
