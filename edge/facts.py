"""What a decision needs of a request's body, and the quick reading of the commonest body of all.

Decides what is that common: a model, a short text, perhaps `stream`, each said once. Must never know nodes. Invariant: what is told here is
what `edge.body` would tell after looking at every member.
"""

from collections.abc import Callable
from operator import attrgetter
from typing import Any, Final

import msgspec

from core.affinity import FIRST_BYTES
from core.events import RequestCame, Route
from core.units import RequestId
from edge.jsonscan import BLOB_MIN_BYTES, is_empty
from edge.prefixes import prefix_keys

BYTES_PER_TOKEN: Final = 4
EMBEDS: Final = (Route.EMBED, Route.EMBEDDINGS, Route.V1_EMBEDDINGS)
"""What they read is kept for nobody."""
_MEMBER_MIN_BYTES: Final = len('"model":1,')


class BodyFacts:
    """What a decision needs of a body. Fields as in `core.events.RequestCame`. Nobody changes them."""

    __slots__ = (
        "constrained",
        "input_tokens",
        "load_only",
        "model",
        "named_once",
        "output_limit",
        "prefixes",
        "problem",
        "runner_options",
        "stream",
        "unload",
    )  # fmt: skip

    def __init__(
        self,
        *,
        model: str | None = None,
        problem: str | None = None,
        stream: bool = False,
        runner_options: str = "",
        input_tokens: int = 0,
        output_limit: int | None = None,
        constrained: bool = False,
        load_only: bool = False,
        unload: bool = False,
        prefixes: tuple[int, ...] = (),
        named_once: bool = True,
    ) -> None:
        self.model = model
        self.problem = problem
        """Why there is no model: one sentence. None when there is one."""
        self.stream = stream
        self.runner_options = runner_options
        self.input_tokens = input_tokens
        self.output_limit = output_limit
        self.constrained = constrained
        self.load_only = load_only
        self.unload = unload
        self.prefixes = prefixes
        self.named_once = named_once
        """The body says in one place only which model it means, so that everybody reads the same one."""

    def __eq__(self, other: object) -> bool:
        return isinstance(other, BodyFacts) and all(getattr(self, name) == getattr(other, name) for name in _FACTS)

    def __hash__(self) -> int:
        return hash((self.model, self.prefixes))

    def __repr__(self) -> str:
        return f"BodyFacts({', '.join(f'{name}={getattr(self, name)!r}' for name in _FACTS)})"

    def came(self, request_id: RequestId, route: Route, client: str, model: str | None, others: tuple[str, ...] = ()) -> RequestCame:
        """What the router is told of such a request, of `client`, for `model`, or one of `others`."""
        return RequestCame(
            request_id=request_id,
            route=route,
            model=model,
            others=others,
            client=client,
            stream=self.stream,
            runner_options=self.runner_options,
            input_tokens=self.input_tokens,
            prefixes=self.prefixes,
            output_limit=self.output_limit,
            constrained=self.constrained,
            load_only=self.load_only,
            unload=self.unload,
        )


_FACTS: Final = (
    "model", "problem", "stream", "runner_options", "input_tokens", "output_limit", "constrained", "load_only", "unload", "prefixes",
    "named_once",
)  # fmt: skip


class _Plain:
    """How one route's commonest body is read: a model, a short text, perhaps `stream`.

    `bare_bytes`: that such a body has beside the values. `is_kept`: whether a node keeps what it read.
    """

    __slots__ = ("bare_bytes", "decode", "is_kept", "text")

    def __init__(self, decode: Callable[[bytes], Any], text: Callable[[Any], msgspec.Raw], bare_bytes: int, is_kept: bool) -> None:
        self.decode = decode
        self.text = text
        self.bare_bytes = bare_bytes
        self.is_kept = is_kept


def _plain(route: Route, name: str) -> _Plain:
    # The other names only keep a body that has them from being an exception: it is seen by its length that there is more.
    fields: list[Any] = [("model", str), (name, msgspec.Raw), ("stream", bool | None, None)]
    fields += [(other, msgspec.Raw | None, None) for other in _OTHERS if other != name]
    shape = msgspec.defstruct("Plain", fields, forbid_unknown_fields=True, gc=False)
    return _Plain(msgspec.json.Decoder(shape).decode, attrgetter(name), len(name) + len('{"model":"","":}'), route not in EMBEDS)


_OTHERS: Final = (
    "messages", "prompt", "input", "options", "keep_alive", "format", "tools", "think", "system", "template", "context", "raw", "images",
    "suffix", "truncate", "dimensions", "temperature", "top_p", "max_tokens", "stop", "seed", "response_format", "stream_options",
)  # fmt: skip
_PLAIN: Final = {
    route: _plain(route, name)
    for route, name in (
        (Route.CHAT, "messages"),
        (Route.GENERATE, "prompt"),
        (Route.EMBED, "input"),
        (Route.EMBEDDINGS, "prompt"),
        (Route.V1_CHAT, "messages"),
        (Route.V1_COMPLETIONS, "prompt"),
        (Route.V1_EMBEDDINGS, "input"),
    )
}
_STREAM_BYTES: Final = {None: 0, True: len(',"stream":true'), False: len(',"stream":false')}
_SPACE: Final = b" \t\r\n"


def plain_facts(route: Route, body: bytes) -> BodyFacts | None:
    """`_facts` of `_members` for the commonest body of all: a model, a short text, perhaps `stream`, each said once. None: any other."""
    plain, size = _PLAIN.get(route), len(body)
    if plain is None or size >= BLOB_MIN_BYTES:
        return None
    try:
        found = plain.decode(body)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return None
    model, stream, text = found.model, found.stream, bytes(plain.text(found))
    length = len(text)
    # What is neither these nor the punctuation that they need: space, unless it is long enough for a member said twice, or another one.
    if size - len(model) - length - plain.bare_bytes - _STREAM_BYTES[stream] >= _MEMBER_MIN_BYTES or not model:
        return None
    if text[0] == 0x6E or ((length <= 2 or text[1] in _SPACE) and is_empty(text)):
        return None
    if stream is None:
        stream = route.streams_by_default
    if length < FIRST_BYTES or not plain.is_kept:
        return BodyFacts(model=model, stream=stream, input_tokens=length // BYTES_PER_TOKEN)
    return BodyFacts(model=model, stream=stream, input_tokens=length // BYTES_PER_TOKEN, prefixes=prefix_keys(text))
