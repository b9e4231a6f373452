"""Speech to text: a form with a file, answered as a chat about it.

Decides what a form asks for and how the text is handed back. What was said in the file is made up, like everything here.
"""

import hashlib
from collections.abc import Sequence
from email import message_from_bytes
from email.message import Message
from typing import Any, Final

import msgspec

from agent.simulated.answers import Piece, go_json
from agent.simulated.asking import Ask, Finder, ask_chat, known_model
from agent.simulated.models import Knobs
from agent.simulated.native import BARE_JSON_TYPE, Figures, Wall
from agent.simulated.openai import OpenAIWriter, TranslationError
from agent.simulated.reading import Refusal

TEXT_TYPE: Final = "text/plain; charset=utf-8"
NO_FORM: Final = "request Content-Type isn't multipart/form-data"


def read_form(body: bytes, content_type: bytes) -> dict[str, Any]:
    """The fields of a form; `file` is what was sent under that name, in bytes. Raises `TranslationError`."""
    if not content_type.lower().startswith(b"multipart/form-data"):
        raise TranslationError(f"failed to parse multipart form: {NO_FORM}")
    form = message_from_bytes(b"Content-Type: " + content_type + b"\r\n\r\n" + body)
    if not form.is_multipart():
        raise TranslationError("failed to parse multipart form: multipart: NextPart: EOF")
    fields: dict[str, Any] = {}
    for part in form.get_payload():
        assert isinstance(part, Message)
        name = part.get_param("name", header="content-disposition")
        content = part.get_payload(decode=True)
        if isinstance(name, str) and isinstance(content, bytes):
            fields[name] = content if name == "file" else content.decode("utf-8", "replace")
    return fields


def ask_transcription(fields: dict[str, Any], find: Finder, knobs: Knobs) -> Ask:
    """What a request to `/v1/audio/transcriptions` asks for."""
    spelling = fields.get("model", "")
    if not spelling.strip():
        raise TranslationError("model is required")
    if "file" not in fields:
        raise TranslationError("file is required: http: no such file")
    model = known_model(spelling, find, missing="model '{}' not found")
    if not model.can("audio"):
        raise Refusal(400, f"{model.full_name} does not support audio")
    heard = hashlib.sha256(fields["file"]).hexdigest()
    said = f"{fields.get('prompt', '')} {fields.get('language', '')} {heard}"
    ask = ask_chat({"model": spelling, "messages": [{"role": "user", "content": said}], "stream": False, "think": None}, find, knobs)
    return msgspec.structs.replace(ask, echo={"response_format": fields.get("response_format", "json")})


class TranscriptionWriter(OpenAIWriter):
    """Writes the answer to `/v1/audio/transcriptions`, which never streams."""

    whole_type: str = BARE_JSON_TYPE

    def __init__(self, ask: Ask, wall: Wall) -> None:
        super().__init__(ask, wall)
        self._plain = ask.echo["response_format"] == "text"
        if self._plain:
            self.whole_type = TEXT_TYPE

    def whole(self, pieces: Sequence[Piece], reason: str, figures: Figures) -> bytes:
        """The text, alone or as the one field of an object."""
        return self.unfinished(pieces)

    def unfinished(self, pieces: Sequence[Piece]) -> bytes:
        """As far as it was heard."""
        text = "".join(piece.content for piece in pieces).strip()
        return text.encode() if self._plain else go_json({"text": text}) + b"\n"
