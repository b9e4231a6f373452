"""Anthropic's Messages route: translated to a chat request, answered by the same machine, written down their way.

Decides the envelope, the blocks and the events; never when anything is sent. What the translation cannot say (keep-alive, context
size, a forced tool) cannot be set here, as in the real one.
"""

from collections.abc import Sequence
from typing import Any, Final

import msgspec

from agent.simulated.answers import Piece, dice_for, go_json
from agent.simulated.asking import Ask, Finder, ask_chat
from agent.simulated.models import Knobs
from agent.simulated.names import CLOUD_OFF
from agent.simulated.native import BARE_JSON_TYPE, JSON_TYPE, Figures, Wall
from agent.simulated.openai import TranslationError
from agent.simulated.reading import Refusal

ERROR_TYPES: Final = {
    400: "invalid_request_error", 401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error",
    503: "overloaded_error", 529: "overloaded_error",
}  # fmt: skip
STOP_REASONS: Final = {"stop": "end_turn", "length": "max_tokens"}
CHARACTERS_PER_TOKEN: Final = 4
"""Of the estimate that a stream begins with."""


def hex_id(kind: str, *parts: object) -> str:
    """`kind`, an underscore and 24 hex digits."""
    return f"{kind}_{dice_for(kind, *parts).randbytes(12).hex()}"


def refused(error: Refusal | TranslationError, wall: Wall) -> tuple[str, bytes]:
    """Content type and body of an error before the first token."""
    refusal = error.refusal if isinstance(error, TranslationError) else error
    if refusal.text == CLOUD_OFF:  # found before any translation
        return JSON_TYPE, go_json({"error": refusal.text})
    kind = ERROR_TYPES.get(refusal.status, "api_error")
    said = {"type": "error", "error": {"type": kind, "message": refusal.text}, "request_id": hex_id("req", wall(), refusal.text)}
    return (JSON_TYPE, go_json(said)) if isinstance(error, TranslationError) else (BARE_JSON_TYPE, go_json(said) + b"\n")


def _text_of(content: Any) -> str:
    """The text of a string, or of a list of blocks."""
    if isinstance(content, str):
        return content
    blocks = content if isinstance(content, list) else []
    return "".join(str(block.get("text", "")) for block in blocks if isinstance(block, dict))


def _translated(message: dict[str, Any]) -> list[dict[str, Any]]:
    """One message as Ollama's own, of which each tool's result is one."""
    role, content = message.get("role", ""), message.get("content")
    if isinstance(content, str) or content is None:
        return [{"role": role, "content": content or ""}]
    if not isinstance(content, list):
        raise TranslationError(f"invalid message content type: {type(content).__name__}")
    own: dict[str, Any] = {"role": role, "content": "", "images": [], "tool_calls": []}
    results = []
    for block in content:
        match block.get("type") if isinstance(block, dict) else None:
            case "text":
                own["content"] += str(block.get("text", ""))
            case "image":
                source = block.get("source")
                if not isinstance(source, dict) or source.get("type") != "base64":
                    raise TranslationError("only base64 images are supported")
                own["images"].append(str(source.get("data", "")))
            case "thinking":
                own["thinking"] = str(block.get("thinking", ""))
            case "tool_use":
                called = {"name": block.get("name", ""), "arguments": block.get("input", {})}
                own["tool_calls"].append({"id": block.get("id", ""), "function": called})
            case "tool_result":
                result = {"role": "tool", "content": _text_of(block.get("content")), "tool_call_id": block.get("tool_use_id", "")}
                results.append(result)
            case _:  # what it does not know it does not read
                pass
    said = own["content"] or own["images"] or own["tool_calls"] or own.get("thinking")
    return [*([own] if said else []), *results]


def _options(fields: dict[str, Any]) -> dict[str, Any]:
    options: dict[str, Any] = {name: fields[name] for name in ("temperature", "top_p", "top_k") if name in fields}
    options["num_predict"] = fields["max_tokens"]
    if fields.get("stop_sequences"):
        options["stop"] = fields["stop_sequences"]
    return options


def _think(fields: dict[str, Any], find: Finder) -> bool | None:
    """Whether to think; a model that cannot is not asked to."""
    kind, effort = fields.get("thinking", {}).get("type"), fields.get("output_config", {}).get("effort")
    if kind is None and effort is None:
        return None
    spelling = fields.get("model", "")
    model = find(spelling) if spelling.strip() else None
    return kind != "disabled" if model is not None and model.can("thinking") else None


def ask_message(fields: dict[str, Any], find: Finder, knobs: Knobs) -> Ask:
    """What a request to `/v1/messages` asks for."""
    if not fields.get("model"):
        raise TranslationError("model is required")
    if fields.get("max_tokens", 0) <= 0:
        raise TranslationError("max_tokens is required and must be positive")
    given = fields.get("messages", [])
    if not given:
        raise TranslationError("messages is required")
    system = _text_of(fields.get("system"))
    messages: list[dict[str, Any]] = [{"role": "system", "content": system}] if system else []
    for message in given:
        messages += _translated(message)
    tools = [
        {
            "type": "function",
            "function": {
                "name": tool.get("name", ""),
                "description": tool.get("description", ""),
                "parameters": tool.get("input_schema", {}),
            },
        }
        for tool in fields.get("tools", [])
        if isinstance(tool, dict) and not str(tool.get("type", "")).startswith("web_search")
    ]
    native = {
        "model": fields["model"],
        "messages": messages,
        "stream": bool(fields.get("stream")),
        "options": _options(fields),
        "think": _think(fields, find),
        "tools": tools,
    }
    ask = ask_chat(native, find, knobs)
    read = sum(len(message["role"]) + len(message["content"]) for message in messages)
    read += sum(len(go_json(tool["function"])) - 40 for tool in tools)
    return msgspec.structs.replace(ask, estimated_tokens=read // CHARACTERS_PER_TOKEN)


class AnthropicWriter:
    """Writes the answers of one request to `/v1/messages`. An event is one write."""

    stream_type: str = "text/event-stream"
    whole_type: str = BARE_JSON_TYPE

    def __init__(self, ask: Ask, wall: Wall) -> None:
        self._ask = ask
        self._wall = wall
        self._id = hex_id("msg", ask.question.prompt, wall())
        self._index = -1  # of the block in work
        self._block = ""  # its type; empty when none is open
        self._started = self._called = False

    @staticmethod
    def _event(kind: str, **fields: Any) -> bytes:
        return f"event: {kind}\n".encode() + b"data: " + go_json({"type": kind, **fields}) + b"\n\n"

    def _start(self, input_tokens: int) -> list[bytes]:
        if self._started:
            return []
        self._started = True
        message = {"id": self._id, "type": "message", "role": "assistant", "model": self._ask.spelling, "content": []}
        return [self._event("message_start", message={**message, "usage": {"input_tokens": input_tokens, "output_tokens": 0}})]

    def _close(self) -> list[bytes]:
        if not self._block:
            return []
        self._block = ""
        return [self._event("content_block_stop", index=self._index)]

    def _open(self, kind: str, **block: Any) -> list[bytes]:
        if self._block == kind and kind != "tool_use":
            return []
        closed = self._close()
        self._block = kind
        self._index += 1
        return [*closed, self._event("content_block_start", index=self._index, content_block={"type": kind, **block})]

    def _delta(self, kind: str, **delta: str) -> bytes:
        return self._event("content_block_delta", index=self._index, delta={"type": kind, **delta})

    def piece(self, piece: Piece) -> list[bytes]:
        """The events of one token."""
        out = self._start(self._ask.estimated_tokens)
        if piece.thinking:
            out += [*self._open("thinking", thinking=""), self._delta("thinking_delta", thinking=piece.thinking)]
        if piece.content:
            out += [*self._open("text", text=""), self._delta("text_delta", text=piece.content)]
        for call in piece.calls:
            self._called = True
            function = call["function"]
            arguments = go_json(function["arguments"]).decode()
            out += self._open("tool_use", id=call["id"], name=function["name"], input={})
            out += [self._delta("input_json_delta", partial_json=arguments), *self._close()]
        return out

    def last(self, pieces: Sequence[Piece], reason: str, figures: Figures) -> list[bytes]:
        """The events that end a stream."""
        usage = {"input_tokens": figures.prompt_tokens, "output_tokens": figures.eval_tokens}
        stop = "tool_use" if self._called else STOP_REASONS.get(reason, "end_turn")
        return [
            *self._start(figures.prompt_tokens),
            *self._close(),
            self._event("message_delta", delta={"stop_reason": stop}, usage=usage),
            self._event("message_stop"),
        ]

    def whole(self, pieces: Sequence[Piece], reason: str, figures: Figures) -> bytes:
        """The answer in one."""
        return self._whole(pieces, reason, figures.prompt_tokens, figures.eval_tokens)

    def unfinished(self, pieces: Sequence[Piece]) -> bytes:
        """A whole answer whose runner ended without saying so."""
        return self._whole(pieces, None, 0, 0)

    def _whole(self, pieces: Sequence[Piece], reason: str | None, input_tokens: int, output_tokens: int) -> bytes:
        content: list[dict[str, Any]] = []
        thinking = "".join(piece.thinking for piece in pieces)
        text = "".join(piece.content for piece in pieces)
        if thinking:
            content.append({"type": "thinking", "thinking": thinking})
        if text:
            content.append({"type": "text", "text": text})
        calls = [call for piece in pieces for call in piece.calls]
        for call in calls:
            function = call["function"]
            content.append({"type": "tool_use", "id": call["id"], "name": function["name"], "input": function["arguments"]})
        blank = reason is None and not pieces
        stop = {} if reason is None else {"stop_reason": "tool_use" if calls else STOP_REASONS.get(reason, "end_turn")}
        said = {
            "id": self._id,
            "type": "message",
            "role": "assistant",
            "model": "" if blank else self._ask.spelling,
            "content": content or None,
            **stop,
            "usage": {"input_tokens": input_tokens, "output_tokens": output_tokens},
        }
        return go_json(said) + b"\n"

    def loaded(self, reason: str) -> bytes:
        """There is always something to answer here."""
        return self._whole([], reason, 0, 0)

    def rendered(self) -> bytes:
        """There is no such request on this route."""
        raise NotImplementedError

    def stream_error(self, text: str) -> list[bytes]:
        """A failure after the first token: nothing is said."""
        return []
