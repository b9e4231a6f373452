"""What a node says while it pulls a model, and what of it is to be believed (`ollama-transfer.md` 1).

Decides how far a pull is, whether it failed and whether trying again can help. Must never know which node it is, or why it pulls. Silence
and steps back are no errors: a part that starts again shows less than before, so the highest number counts. A layer that is done within
60 ms has no line at all.

Invariants: `completed` of a layer never goes back and never exceeds its total; nothing that a node sends makes this grow without limit.
"""

import re
from collections.abc import Iterable
from typing import Any, Final

import msgspec

LAYERS_MAX: Final = 256
"""Layers of one model that are looked at."""
LINE_MAX_BYTES: Final = 64 << 10
"""A longer line is none of Ollama's."""
TEXT_MAX: Final = 500
"""Characters of an error or a status that are kept."""

BYTES_MAX: Final = 1 << 53

_FINAL: Final = re.compile(
    r"file does not exist|invalid model name|not found|unauthorized|access denied|no space left|disk quota"
    r"|pull model manifest: 4(?!08|25|29)\d\d|^4\d\d: |does not match original host|tls: |requires a newer version|^EOF$",
    re.IGNORECASE,
)
_PATH: Final = re.compile(r"(?<![\w:/.])/(?:[^\s/:\"']+/)+[^\s:\"']*|\b[A-Za-z]:\\[^\s:\"']+")
_EMPTY_PART: Final = "EOF"


class Layer(msgspec.Struct, frozen=True, gc=False):
    """One file of a model, in bytes. `total` 0: not told."""

    digest: str
    total: int = 0
    completed: int = 0


class PullReader:
    """Reads the lines of one pull as they come."""

    __slots__ = ("_held", "_layers", "error", "phase", "succeeded")

    def __init__(self) -> None:
        self._held = b""
        self._layers: dict[str, Layer] = {}
        self.phase = ""
        """The last status line."""
        self.error: str | None = None
        """The node's own words for why it failed."""
        self.succeeded = False

    @property
    def layers(self) -> tuple[Layer, ...]:
        """As far as they were told, in the order of the manifest."""
        return tuple(self._layers.values())

    def feed(self, data: bytes) -> None:
        """Bytes of the answer, cut anywhere."""
        *lines, held = (self._held + data).split(b"\n")
        self._held = held if len(held) <= LINE_MAX_BYTES else b""
        for line in lines:
            self._line(line)

    def close(self) -> None:
        """The answer is over; what came without a line end is read too."""
        held, self._held = self._held, b""
        self._line(held)

    def _line(self, line: bytes) -> None:
        try:
            said: Any = msgspec.json.decode(line)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            return
        if not isinstance(said, dict):
            return
        if "error" in said:
            self.error = str(said["error"])[:TEXT_MAX]
        status, digest = said.get("status"), said.get("digest")
        if not isinstance(status, str):
            return
        self.phase = status[:TEXT_MAX]
        self.succeeded = status == "success"
        if isinstance(digest, str) and (digest in self._layers or len(self._layers) < LAYERS_MAX):
            told = Layer(digest[:TEXT_MAX], _size(said.get("total")), _size(said.get("completed")))
            self._layers[digest] = farther(self._layers.get(digest), told)


def farther(known: Layer | None, told: Layer) -> Layer:
    """What is known of a layer after one more word about it: the highest of both, `completed` no more than `total`."""
    if known is None:
        return Layer(told.digest, told.total, min(told.completed, told.total))
    total = max(told.total, known.total)
    return Layer(told.digest, total, min(max(told.completed, known.completed), total))


def joined(known: Iterable[Layer], told: Iterable[Layer]) -> tuple[Layer, ...]:
    """`known` and what was told since, layer by layer; new ones come last."""
    layers = {layer.digest: layer for layer in known}
    for layer in told:
        if layer.digest in layers or len(layers) < LAYERS_MAX:
            layers[layer.digest] = farther(layers.get(layer.digest), layer)
    return tuple(layers.values())


def may_repeat(error: str) -> bool:
    """Whether a pull that failed with these words may succeed when it is tried again (most of what came is kept)."""
    return _FINAL.search(error) is None


def explained(error: str) -> str:
    """A node's words for people elsewhere: without paths of its disk, and with what to do where the words alone do not say it."""
    if error == _EMPTY_PART:
        return "EOF (the node keeps an empty part of an earlier download: remove the files sha256-*-partial* of its model directory)"
    return _PATH.sub("<path>", error)[:TEXT_MAX]


def what_is_wrong(row: object, layers: Iterable[Layer]) -> str | None:
    """Why a model is not what its pull promised, by the row that `/api/tags` shows of it afterwards; None: it is.

    A node says `success` for hollow models too. The size of a whole one is at least that of the layers that were told.
    """
    if row is None:
        return "the node said success, but does not list the model: it was deleted meanwhile, or a part of it is missing"
    size = row.get("size") if isinstance(row, dict) else None
    if not isinstance(size, int):
        return None
    if size == 0:
        return "the node said success, but the model is empty: the registry sent a manifest without layers"
    if size < sum(layer.total for layer in layers):
        return f"the node said success, but lists the model with {size} bytes only: delete it there and pull it again"
    return None


def _size(value: object) -> int:
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= BYTES_MAX else 0
