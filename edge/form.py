"""A form (`multipart/form-data`), as `/v1/audio/transcriptions` takes it: which model it names, and where.

Decides what a part is, strictly: what is not written as every client writes it has no model here, and its node says what is wrong with
it. Never looks into a file. Invariants: what is held at a time is one piece of the body and one part's head; the first `model` counts, as
for Go, and a second one, in the form or in the address, is told (`named_once`).
"""

from email.message import Message
from email.parser import BytesHeaderParser
from typing import Final
from urllib.parse import parse_qs

from edge.body import IMAGE_TOKENS, PIECE_BYTES, Body
from edge.facts import BodyFacts
from edge.splice import Span

HEAD_MAX_BYTES: Final = 8 << 10
"""Of one part."""
VALUE_MAX_BYTES: Final = 1 << 10
PARTS_MAX: Final = 64
BOUNDARY_MAX_BYTES: Final = 70

_UNREADABLE: Final = "the request's form cannot be read; send multipart/form-data with a model and a file"


class _Form:
    """Fed with a body piece by piece; `models` fills with the values of that name and where they stand."""

    def __init__(self, boundary: bytes) -> None:
        self.models: list[tuple[bytes, Span]] = []
        self.done = False
        self.broken = False
        self._delimiter = b"\r\n--" + boundary
        self._buffer = b"\r\n"  # the first delimiter has no line end before it
        self._at = -2  # of the buffer's first byte in the body
        self._in_head = False
        self._names_model = False
        self._begin = 0
        self._parts = 0

    def feed(self, data: bytes) -> None:
        """More of the body."""
        self._buffer += data
        while not (self.done or self.broken) and (self._head() if self._in_head else self._data()):
            pass

    def _head(self) -> bool:
        """Past the rest of a delimiter's line and a part's head; False: more bytes are needed."""
        buffer = self._buffer
        if buffer.startswith(b"--"):
            self.done = True
            return True
        end = buffer.find(b"\r\n\r\n")
        if len(buffer) < 2 or end < 0:
            self.broken = len(buffer) > HEAD_MAX_BYTES
            return False
        self._parts += 1
        self.broken = not buffer.startswith(b"\r\n") or self._parts > PARTS_MAX or end > HEAD_MAX_BYTES
        head: Message = BytesHeaderParser().parsebytes(buffer[2 : end + 4])
        name, filename = (head.get_param(key, header="content-disposition") for key in ("name", "filename"))
        self._names_model = name == "model" and filename is None
        self._drop(end + 4)
        self._begin = self._at
        self._in_head = False
        return True

    def _data(self) -> bool:
        """Past a part's data and the delimiter behind it; False: more bytes are needed."""
        found = self._buffer.find(self._delimiter)
        if found < 0:
            if self._names_model and len(self._buffer) > VALUE_MAX_BYTES + len(self._delimiter):
                self.broken = True
            elif not self._names_model:
                self._drop(max(0, len(self._buffer) - len(self._delimiter)))
            return False
        if self._names_model:
            self.models.append((self._buffer[:found], Span(self._begin, self._at + found)))
            self._names_model = False
        self._drop(found + len(self._delimiter))
        self._in_head = True
        return True

    def _drop(self, size: int) -> None:
        self._buffer = self._buffer[size:]
        self._at += size


async def read_form(body: Body, content_type: bytes, query: bytes) -> tuple[BodyFacts, Span | None]:
    """What the form in `body` says, and where its model's name stands."""
    boundary = _boundary(content_type)
    if boundary is None:
        return BodyFacts(problem=_UNREADABLE), None
    form = _Form(boundary)
    for offset in range(0, body.length, PIECE_BYTES):
        form.feed(await body.read_at(offset))
        if form.done or form.broken:
            break
    if not form.done or not form.models:
        return BodyFacts(problem=_UNREADABLE), None
    raw, span = form.models[0]
    model = raw.decode("utf-8", "replace")
    if not model or len(raw) > VALUE_MAX_BYTES:
        return BodyFacts(problem='the request names no model; set the form field "model"'), None
    once = len(form.models) == 1 and "model" not in parse_qs(query.decode("ascii", "replace"), keep_blank_values=True)
    return BodyFacts(model=model, input_tokens=IMAGE_TOKENS, named_once=once), span


def _boundary(content_type: bytes) -> bytes | None:
    head = Message()
    head["content-type"] = content_type.decode("latin-1")
    boundary = head.get_param("boundary")
    if head.get_content_type() != "multipart/form-data" or not isinstance(boundary, str):
        return None
    return boundary.encode("latin-1", "replace") if 0 < len(boundary) <= BOUNDARY_MAX_BYTES else None
