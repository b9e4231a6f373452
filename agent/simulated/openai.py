"""The OpenAI-compatible routes: translated to Ollama's own requests, answered by the same machine, written down their way.

Decides envelopes, ids and finish reasons; never when anything is sent. What the translation cannot say (keep-alive, context size)
cannot be set here, as in the real one.
"""

import base64
import struct
from collections.abc import Sequence
from datetime import datetime
from typing import Any, Final

import msgspec

from agent.simulated.answers import Piece, dice_for, go_json, logprobs, vector
from agent.simulated.asking import Ask, Finder, ask_chat, ask_embed, ask_generate
from agent.simulated.models import Knobs, SimulatedModel
from agent.simulated.names import CLOUD_OFF
from agent.simulated.native import BARE_JSON_TYPE, JSON_TYPE, Figures, Wall
from agent.simulated.reading import Refusal

EFFORTS: Final = ("minimal", "low", "medium", "high", "xhigh", "ultra", "max", "none")
ERROR_TYPES: Final = {400: "invalid_request_error", 404: "not_found_error"}
FINGERPRINT: Final = "fp_ollama"
DONE: Final = b"data: [DONE]\n\n"


class TranslationError(Exception):
    """The request was refused before Ollama's own handlers saw it, which shows in the content type."""

    def __init__(self, text: str, status: int = 400) -> None:
        super().__init__(text)
        self.refusal = Refusal(status, text)


def envelope(refusal: Refusal) -> bytes:
    """OpenAI's form of an error."""
    kind = ERROR_TYPES.get(refusal.status, "api_error")
    return go_json({"error": {"message": refusal.text, "type": kind, "param": None, "code": None}})


def refused(error: Refusal | TranslationError, wall: Wall | None = None) -> tuple[str, bytes]:
    """Content type and body of an error before the first token."""
    if isinstance(error, TranslationError):
        return JSON_TYPE, envelope(error.refusal)
    if error.text == CLOUD_OFF:  # found before any translation
        return JSON_TYPE, go_json({"error": error.text})
    return BARE_JSON_TYPE, envelope(error) + b"\n"


def checked_effort(effort: Any) -> bool | None:
    """Whether to think, or None where nothing is said."""
    if not effort:
        return None
    if effort not in EFFORTS:
        listed = ", ".join(f'"{known}"' for known in EFFORTS[:-1])
        raise TranslationError(f'invalid reasoning value: "{effort}" (must be {listed}, or "none")')
    return bool(effort != "none")


def _options(fields: dict[str, Any]) -> dict[str, Any]:
    options: dict[str, Any] = {"temperature": fields.get("temperature", 1.0), "top_p": fields.get("top_p", 1.0)}
    options |= {name: fields[name] for name in ("seed", "frequency_penalty", "presence_penalty") if name in fields}
    if "max_tokens" in fields:
        options["num_predict"] = fields["max_tokens"]
    stop = fields.get("stop")
    if stop:
        options["stop"] = [stop] if isinstance(stop, str) else stop
    return options


def _usage_wanted(fields: dict[str, Any]) -> bool:
    return bool(fields.get("stream_options", {}).get("include_usage"))


def _content(message: dict[str, Any]) -> tuple[str, list[str]]:
    """Text and images of a message whose content may come in parts."""
    content = message.get("content")
    if content is None or isinstance(content, str):
        return content or "", []
    if not isinstance(content, list):
        raise TranslationError(f"invalid message content type: {type(content).__name__}")
    text, images = [], []
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "text":
            text.append(str(part.get("text", "")))
        elif kind == "image_url":
            url = part.get("image_url")
            address = str(url.get("url", "") if isinstance(url, dict) else url)
            if not address.startswith("data:"):
                raise TranslationError("image URLs are not currently supported, please use base64 encoded data instead")
            images.append(address.partition(",")[2])
        else:
            raise TranslationError("invalid message format")
    return "\n".join(text), images


def ask_chat_completion(fields: dict[str, Any], find: Finder, knobs: Knobs) -> Ask:
    """What a request to `/v1/chat/completions` asks for."""
    messages = fields.get("messages", [])
    if not messages:
        raise TranslationError("[] is too short - 'messages'")
    reasoning = fields.get("reasoning")
    think = checked_effort(fields.get("reasoning_effort") or (reasoning.get("effort") if isinstance(reasoning, dict) else None))
    translated = []
    for message in messages:
        text, images = _content(message)
        translated.append({"role": message.get("role", ""), "content": text, "images": images})
    named: dict[str, Any] = {name: fields[name] for name in ("tools", "logprobs", "top_logprobs") if name in fields}
    native: dict[str, Any] = {
        "model": fields.get("model", ""),
        "messages": translated,
        "stream": bool(fields.get("stream")),
        "options": _options(fields),
        "think": think,
        "format": _schema(fields.get("response_format")),
        **named,
    }
    ask = ask_chat(native, find, knobs)
    return msgspec.structs.replace(ask, include_usage=_usage_wanted(fields), echo={"separate_finish": knobs.separate_finish})


def _schema(response_format: Any) -> Any:
    kind = response_format.get("type") if isinstance(response_format, dict) else None
    if kind == "json_object":
        return "json"
    if kind == "json_schema":
        schema = response_format.get("json_schema")
        return schema.get("schema") if isinstance(schema, dict) else None
    return None


def ask_completion(fields: dict[str, Any], find: Finder, knobs: Knobs) -> Ask:
    """What a request to `/v1/completions` asks for."""
    native = {
        "model": fields.get("model", ""),
        "prompt": fields.get("prompt", ""),
        "suffix": fields.get("suffix", ""),
        "stream": bool(fields.get("stream")),
        "options": _options(fields),
    }
    return msgspec.structs.replace(ask_generate(native, find, knobs), include_usage=_usage_wanted(fields))


def ask_embedding(fields: dict[str, Any], find: Finder, knobs: Knobs) -> Ask:
    """What a request to `/v1/embeddings` asks for."""
    coding = fields.get("encoding_format", "")
    if coding not in ("", "float", "base64"):
        raise TranslationError(f"Invalid value for 'encoding_format' = {coding}. Supported values: ['float', 'base64'].")
    if fields.get("input") in (None, "", []):
        raise TranslationError("invalid input")
    native: dict[str, Any] = {name: fields[name] for name in ("model", "input", "dimensions") if name in fields}
    return msgspec.structs.replace(ask_embed(native, find, knobs), base64=coding == "base64")


class OpenAIWriter:
    """Writes the answers of one request to `/v1/chat/completions` or `/v1/completions`."""

    stream_type: str = "text/event-stream"
    whole_type: str = BARE_JSON_TYPE

    def __init__(self, ask: Ask, wall: Wall, *, chat: bool = False) -> None:
        self._ask = ask
        self._wall = wall
        self._chat = chat
        self._first = True
        self._called = False
        number = dice_for(ask.question.prompt, wall()).randrange(999)
        self._id = f"chatcmpl-{number}" if chat else f"cmpl-{number}"

    def _event(self, choices: list[dict[str, Any]], usage: dict[str, int] | None = None, *, model: str | None = None) -> bytes:
        created = self._wall() // 1_000_000_000
        said: dict[str, Any] = {"id": self._id, "object": "chat.completion.chunk" if self._chat else "text_completion", "created": created}
        named = {"model": self._ask.spelling if model is None else model, "system_fingerprint": FINGERPRINT}
        said |= {**named, "choices": choices} if self._chat else {"choices": choices, **named}
        if usage is not None:
            said["usage"] = usage
        return b"data: " + go_json(said) + b"\n\n"

    def _no_usage(self) -> dict[str, int] | None:
        return _usage(0, 0) if self._ask.include_usage and not self._chat else None

    def _delta(self, **delta: Any) -> list[dict[str, Any]]:
        role = {"role": "assistant"} if self._first else {}
        self._first = False
        return [{"index": 0, "delta": {**role, **delta}, "finish_reason": None}]

    def _logprobs(self, pieces: Sequence[Piece]) -> dict[str, Any]:
        top = self._ask.logprobs
        return {} if top is None or not pieces else {"logprobs": {"content": logprobs(pieces, top)}}

    def piece(self, piece: Piece) -> list[bytes]:
        """The event of one token."""
        if not self._chat:
            return [self._event([{"text": piece.content, "index": 0, "finish_reason": None}], self._no_usage())]
        more: dict[str, Any] = {}
        if piece.thinking:
            more["reasoning"] = piece.thinking
        if piece.calls:
            self._called = True
            more["tool_calls"] = [_call(call) for call in piece.calls]
        choices = self._delta(content=piece.content, **more)
        choices[0] |= self._logprobs([piece])
        return [self._event(choices)]

    def last(self, pieces: Sequence[Piece], reason: str, figures: Figures) -> list[bytes]:
        """What ends a stream, all of it one write."""
        finish = "tool_calls" if self._called else reason
        if self._chat:
            opened = self._event(self._delta(content="")) if self._first else b""
            delta = {} if self._ask.echo.get("separate_finish", True) else {"content": ""}
            out = opened + self._event([{"index": 0, "delta": delta, "finish_reason": finish}])
        else:
            out = self._event([{"text": "", "index": 0, "finish_reason": reason}], self._no_usage())
        if self._ask.include_usage:
            out += self._event([], _usage(figures.prompt_tokens, figures.eval_tokens))
        return [out + DONE]

    def whole(self, pieces: Sequence[Piece], reason: str, figures: Figures) -> bytes:
        """The answer in one."""
        return self._whole(pieces, reason, figures.prompt_tokens, figures.eval_tokens)

    def unfinished(self, pieces: Sequence[Piece]) -> bytes:
        """A whole answer whose runner ended without saying so."""
        return self._whole(pieces, None, 0, 0)

    def _whole(self, pieces: Sequence[Piece], reason: str | None, prompt_tokens: int, eval_tokens: int) -> bytes:
        content = "".join(piece.content for piece in pieces)
        thinking = "".join(piece.thinking for piece in pieces)
        calls = [_call(call) for piece in pieces for call in piece.calls]
        finish = "tool_calls" if calls and reason else reason
        choice: dict[str, Any]
        if self._chat:
            message: dict[str, Any] = {"role": "assistant", "content": content}
            if thinking:
                message["reasoning"] = thinking
            if calls:
                message["tool_calls"] = calls
            choice = {"index": 0, "message": message, "finish_reason": finish, **self._logprobs(pieces)}
        else:
            choice = {"text": content, "index": 0, "finish_reason": reason}
        said = {
            "id": self._id,
            "object": "chat.completion" if self._chat else "text_completion",
            "created": self._wall() // 1_000_000_000,
            "model": self._ask.spelling,
            "system_fingerprint": FINGERPRINT,
            "choices": [choice],
            "usage": _usage(prompt_tokens, eval_tokens),
        }
        return go_json(said) + b"\n"

    def loaded(self, reason: str) -> bytes:
        """The answer to a completion without a prompt."""
        return self._whole([], reason, 0, 0)

    def rendered(self) -> bytes:
        """There is no such request on these routes."""
        raise NotImplementedError

    def stream_error(self, text: str) -> list[bytes]:
        """A failure after the first token: the text is lost, an empty chunk is all there is."""
        if self._chat:
            return [self._event(self._delta(content=""), model="")]
        return [self._event([{"text": "", "index": 0, "finish_reason": None}], self._no_usage(), model="")]


def _usage(prompt_tokens: int, completion_tokens: int) -> dict[str, int]:
    return {"prompt_tokens": prompt_tokens, "completion_tokens": completion_tokens, "total_tokens": prompt_tokens + completion_tokens}


def _call(call: dict[str, Any]) -> dict[str, Any]:
    function = call["function"]
    arguments = go_json(function["arguments"]).decode()
    return {
        "id": call["id"],
        "index": function["index"],
        "type": "function",
        "function": {"name": function["name"], "arguments": arguments},
    }


def embedded(ask: Ask) -> bytes:
    """The answer of `/v1/embeddings`."""
    rows = []
    for at, text in enumerate(ask.inputs):
        values = vector(ask.model, text, ask.dimensions)
        coded = base64.b64encode(struct.pack(f"<{len(values)}f", *values)).decode() if ask.base64 else values
        rows.append({"object": "embedding", "embedding": coded, "index": at})
    usage = {"prompt_tokens": ask.prompt_tokens, "total_tokens": ask.prompt_tokens}
    return go_json({"object": "list", "data": rows, "model": ask.spelling, "usage": usage}) + b"\n"


def model_row(model: SimulatedModel, shown: str) -> dict[str, Any]:
    """A row of `/v1/models`, under the name `shown`."""
    created = int(datetime.fromisoformat(model.modified_at[:19] + "+00:00").timestamp())
    return {"id": shown, "object": "model", "created": created, "owned_by": model.parts[1]}


def models(known: Sequence[SimulatedModel]) -> bytes:
    """The answer of `/v1/models`; no models are `null`."""
    rows = [model_row(model, model.name) for model in known]
    return go_json({"object": "list", "data": rows or None}) + b"\n"
