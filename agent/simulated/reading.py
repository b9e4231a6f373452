"""JSON as Ollama's Go decoder reads it, and the words in which it complains.

Decides what a body says: keys match whatever their case, the last duplicate wins, objects under one key are merged, only the first value
counts, broken UTF-8 and lone surrogates become U+FFFD. It never knows routes or models.

Invariant: no body, however deep or broken, raises anything but `Refusal`.
"""

import json
import math
import re
from typing import Any, Final

DEPTH_LIMIT: Final = 10_000
SAFE_DEPTH: Final = 200
"""Nothing that Ollama has a field for lies deeper; what does is read as null, so that reading never recurses far."""

LONG_NUMBER: Final = 300
"""Digits; Python refuses to read integers of thousands of them."""

FOLDED: Final = {0x17F: "s", 0x212A: "k"}
"""The two characters outside ASCII that fold to an ASCII letter."""
SPACE: Final = re.compile(r"[ \t\r\n]*")
BRACKET: Final = re.compile(r'[\[{\]}]|"(?:[^"\\]|\\.)*"?', re.DOTALL)
PLACES: Final = {
    "Expecting value": "looking for beginning of value",
    "Expecting property name enclosed in double quotes": "looking for beginning of object key string",
    "Illegal trailing comma before end of array": "looking for beginning of value",
    "Illegal trailing comma before end of object": "looking for beginning of object key string",
    "Expecting ':' delimiter": "after object key",
    "Invalid control character at": "in string literal",
    "Invalid \\escape": "in string escape code",
    "Invalid \\uXXXX escape": "in \\u hexadecimal character escape",
}
GO_QUOTED: Final = {ord("'"): "\\'", 7: "\\a", 8: "\\b", 9: "\\t", 10: "\\n", 11: "\\v", 12: "\\f", 13: "\\r", 92: "\\\\"}
GO_KINDS: Final = ((bool, "bool"), (int, "number"), (float, "number"), (str, "string"), (list, "array"))

STRUCTS: Final[dict[str, dict[str, str]]] = {
    "GenerateRequest": {
        "model": "string", "prompt": "string", "suffix": "string", "system": "string", "template": "string", "context": "[]int",
        "stream": "bool", "raw": "bool", "format": "any", "keep_alive": "any", "images": "[]image", "options": "map", "think": "any",
        "truncate": "bool", "shift": "bool", "logprobs": "bool", "top_logprobs": "int", "_debug_render_only": "bool",
    },
    "ChatRequest": {
        "model": "string", "messages": "[]api.Message", "stream": "bool", "format": "any", "keep_alive": "any", "tools": "[]api.Tool",
        "options": "map", "think": "any", "truncate": "bool", "shift": "bool", "logprobs": "bool", "top_logprobs": "int",
        "_debug_render_only": "bool",
    },
    "Message": {
        "role": "string", "content": "string", "thinking": "string", "images": "[]image", "tool_calls": "any", "tool_name": "string",
        "tool_call_id": "string",
    },
    "Tool": {"type": "string", "function": "api.ToolFunction"},
    "ToolFunction": {"name": "string", "description": "string", "parameters": "any"},
    "EmbedRequest": {
        "model": "string", "input": "any", "truncate": "bool", "dimensions": "int", "keep_alive": "any", "options": "map",
    },
    "EmbeddingRequest": {"model": "string", "prompt": "string", "keep_alive": "any", "options": "map"},
    "ShowRequest": {"model": "string", "name": "string", "verbose": "bool", "system": "string", "options": "map"},
    "DeleteRequest": {"model": "string", "name": "string"},
    "CopyRequest": {"source": "string", "destination": "string"},
    "PullRequest": {
        "model": "string", "name": "string", "insecure": "bool", "username": "string", "password": "string", "stream": "bool",
    },
    "PushRequest": {
        "model": "string", "name": "string", "insecure": "bool", "username": "string", "password": "string", "stream": "bool",
    },
    "CreateRequest": {
        "model": "string", "name": "string", "stream": "bool", "quantize": "string", "from": "string", "remote_host": "string",
        "files": "map", "adapters": "map", "template": "string", "license": "any", "system": "string", "parameters": "map",
        "messages": "[]api.Message", "renderer": "string", "parser": "string", "requires": "string", "info": "map",
    },
    "ChatCompletionRequest": {
        "model": "string", "messages": "[]openai.Message", "stream": "bool", "stream_options": "openai.StreamOptions",
        "max_tokens": "int", "seed": "int", "stop": "any", "temperature": "float64", "top_p": "float64", "frequency_penalty": "float64",
        "presence_penalty": "float64", "response_format": "any", "tools": "[]api.Tool", "reasoning": "any", "reasoning_effort": "string",
        "logprobs": "bool", "top_logprobs": "int",
    },
    "StreamOptions": {"include_usage": "bool"},
    "OpenAIMessage": {
        "role": "string", "content": "any", "reasoning": "string", "tool_calls": "any", "name": "string", "tool_call_id": "string",
    },
    "CompletionRequest": {
        "model": "string", "prompt": "string", "suffix": "string", "stream": "bool", "stream_options": "openai.StreamOptions",
        "max_tokens": "int", "seed": "int", "stop": "any", "temperature": "float64", "top_p": "float64", "frequency_penalty": "float64",
        "presence_penalty": "float64",
    },
    "ResponsesRequest": {
        "model": "string", "input": "any", "instructions": "string", "max_output_tokens": "int", "reasoning": "openai.ResponsesReasoning",
        "temperature": "float64", "top_p": "float64", "text": "openai.ResponsesText", "tools": "[]any", "truncation": "string",
        "stream": "bool",
    },
    "ResponsesReasoning": {"effort": "string", "generate_summary": "string", "summary": "string"},
    "ResponsesText": {"format": "any"},
    "MessagesRequest": {
        "model": "string", "max_tokens": "int", "messages": "[]anthropic.MessageParam", "system": "any", "stream": "bool",
        "temperature": "float64", "top_p": "float64", "top_k": "int", "stop_sequences": "[]string", "tools": "[]any", "tool_choice": "any",
        "thinking": "anthropic.ThinkingConfig", "metadata": "any", "output_config": "anthropic.OutputConfig",
    },
    "MessageParam": {"role": "string", "content": "any"},
    "ThinkingConfig": {"type": "string", "budget_tokens": "int"},
    "OutputConfig": {"effort": "string"},
    "OpenAIEmbedRequest": {"model": "string", "input": "any", "dimensions": "int", "encoding_format": "string"},
}  # fmt: skip
"""Field names and Go types of what Ollama decodes into."""
NESTED: Final = {
    "api.Message": "Message",
    "api.Tool": "Tool",
    "api.ToolFunction": "ToolFunction",
    "openai.Message": "OpenAIMessage",
    "openai.StreamOptions": "StreamOptions",
    "openai.ResponsesReasoning": "ResponsesReasoning",
    "openai.ResponsesText": "ResponsesText",
    "anthropic.MessageParam": "MessageParam",
    "anthropic.ThinkingConfig": "ThinkingConfig",
    "anthropic.OutputConfig": "OutputConfig",
}
PACKAGES: Final = {
    "ChatCompletionRequest": "openai",
    "CompletionRequest": "openai",
    "OpenAIEmbedRequest": "openai",
    "ResponsesRequest": "openai",
    "MessagesRequest": "anthropic",
}
"""Whose structs they are; the others are `api`'s."""
GO_NAMES: Final = {"OpenAIMessage": "Message", "OpenAIEmbedRequest": "EmbedRequest"}


class Refusal(Exception):
    """The request is answered with `status` and `text`, before anything was scheduled.

    `early` marks what Ollama's own handlers find; the rest comes back from the runner, framed another way.
    """

    def __init__(self, status: int, text: str, *, early: bool = True) -> None:
        super().__init__(text)
        self.status = status
        self.text = text
        self.early = early


class Pairs(list[tuple[str, Any]]):
    """A JSON object as it was written: duplicates and all."""


def fold(key: str) -> str:
    """What two spellings of one field name have in common."""
    return key.translate(FOLDED).lower()


def first_value(body: bytes) -> Any:
    """The first JSON value of `body`, objects as `Pairs`. Raises `Refusal` (400) with Go's words."""
    text = body.decode("utf-8", "replace")
    start = SPACE.match(text).end()  # type: ignore[union-attr]  # matches the empty string too
    if start == len(text):
        raise Refusal(400, "missing request body")
    if body[:3] == b"\xef\xbb\xbf":
        raise Refusal(400, "invalid character 'ï' looking for beginning of value")
    if text.count("[") + text.count("{") > SAFE_DEPTH:
        text = _flattened(text)
    decoder = json.JSONDecoder(object_pairs_hook=Pairs, parse_constant=_no_constant, parse_float=_number, parse_int=_integer)
    try:
        value, _ = decoder.raw_decode(text, start)
    except json.JSONDecodeError as error:
        raise Refusal(400, _go_words(text, error)) from None
    except _NoConstant as error:
        raise Refusal(400, f"invalid character '{str(error)[0]}' looking for beginning of value") from None
    return value


class _NoConstant(Exception):
    """NaN or Infinity, which are no JSON."""


def _no_constant(name: str) -> None:
    raise _NoConstant(name)


def _number(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        raise Refusal(400, f"json: cannot unmarshal number {text} into Go value of type float64")
    return value


def _integer(text: str) -> int | float:
    return int(text) if len(text) <= LONG_NUMBER else _number(text)


def _flattened(text: str) -> str:
    """`text` with everything below `SAFE_DEPTH` as null."""
    out: list[str] = []
    depth = kept_to = 0
    for match in BRACKET.finditer(text):
        mark = match[0]
        if mark in "[{":
            depth += 1
            if depth > DEPTH_LIMIT:
                raise Refusal(400, f"invalid character '{mark}' exceeded max depth")
            if depth == SAFE_DEPTH:
                out.append(text[kept_to : match.start()])
        elif mark in "]}":
            if depth == SAFE_DEPTH:
                out.append("null")
                kept_to = match.end()
            depth -= 1
            if depth <= 0:
                break
    if depth < SAFE_DEPTH:
        out.append(text[kept_to:])
    return "".join(out)


def _go_words(text: str, error: json.JSONDecodeError) -> str:
    at = error.pos
    if error.msg.startswith("Unterminated") or at >= len(text):
        return "unexpected EOF"
    if error.msg == "Expecting value" or error.msg.startswith("Illegal trailing comma"):
        at = SPACE.match(text, at + (text[at] == ",")).end()  # type: ignore[union-attr]
    if at >= len(text):
        return "unexpected EOF"
    place = PLACES.get(error.msg)
    if place is None:  # a comma is missing: Go says after what
        before = text[:at].rstrip()
        place = "after array element" if _innermost(before) == "[" else "after object key:value pair"
    if error.msg == "Invalid \\escape":
        at += 1
    byte = text[at].encode("utf-8", "replace")[:1]
    shown = GO_QUOTED.get(byte[0]) or (f"\\x{byte[0]:02x}" if byte[0] < 32 else byte.decode("latin-1"))
    return f"invalid character '{shown}' {place}"


def _innermost(text: str) -> str:
    opened: list[str] = []
    for match in BRACKET.finditer(text):
        if match[0] in "[{":
            opened.append(match[0])
        elif match[0] in "]}" and opened:
            opened.pop()
    return opened[-1] if opened else ""


def plain(value: Any) -> Any:
    """`value` with its `Pairs` as dicts, the last duplicate winning, and no lone surrogates."""
    if isinstance(value, Pairs):
        return {plain(key): plain(item) for key, item in value}
    if isinstance(value, list):
        return [plain(item) for item in value]
    return text_of(value) if isinstance(value, str) else value


def text_of(text: str) -> str:
    """`text` with lone surrogates replaced, as Go does when it reads them."""
    if text.isascii():
        return text
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def read_request(body: bytes, struct: str) -> dict[str, Any]:
    """The fields of `body` that `struct` knows, by their own names; absent ones are absent. Raises `Refusal` (400)."""
    value = first_value(body)
    if value is None:
        return {}
    if not isinstance(value, Pairs):
        package = PACKAGES.get(struct, "api")
        raise Refusal(400, f"json: cannot unmarshal {_kind(value)} into Go value of type {package}.{GO_NAMES.get(struct, struct)}")
    return read_struct(value, struct, "")


def read_struct(pairs: Pairs, struct: str, path: str) -> dict[str, Any]:
    """`pairs` as the Go struct sees them. `path` leads to it, for complaints."""
    fields = STRUCTS[struct]
    out: dict[str, Any] = {}
    for key, value in pairs:
        name = key if key in fields else fold(key)
        kind = fields.get(name)
        if kind is None:
            continue
        if value is None:  # leaves a plain field as it is, empties the others
            if kind in ("any", "map") or kind.startswith("[]"):
                out.pop(name, None)
            continue
        where = f"{path}{name}"
        if kind == "map" and isinstance(value, Pairs):
            out[name] = {**out.get(name, {}), **plain(value)}
        elif kind in NESTED:
            if not isinstance(value, Pairs):
                raise _wrong(value, struct, where, kind)
            out[name] = {**out.get(name, {}), **read_struct(value, NESTED[kind], f"{where}.")}
        else:
            out[name] = _field(value, kind, struct, where)
    return out


def _field(value: Any, kind: str, struct: str, where: str) -> Any:
    if kind == "any":
        return plain(value)
    if kind.startswith("[]"):
        if not isinstance(value, list) or isinstance(value, Pairs):
            raise _wrong(value, struct, where, kind.replace("image", "api.ImageData"))
        inner = kind[2:]
        if inner in NESTED:
            return [
                read_struct(item, NESTED[inner], f"{where}.") if isinstance(item, Pairs) else _item(item, struct, where, inner)
                for item in value
            ]
        return [_field(item, inner, struct, where) for item in value if item is not None]
    wrong = _wrong(value, struct, where, "string" if kind == "image" else "map[string]interface {}" if kind == "map" else kind)
    if kind in ("string", "image"):
        if not isinstance(value, str):
            raise wrong
        return text_of(value)
    if kind == "bool":
        if not isinstance(value, bool):
            raise wrong
    elif kind == "int":
        if not isinstance(value, int) or isinstance(value, bool):
            raise wrong
    elif not isinstance(value, (int, float)) or isinstance(value, bool):
        raise wrong
    return value


def _item(value: Any, struct: str, where: str, kind: str) -> dict[str, Any]:
    if value is None:
        return {}
    raise _wrong(value, struct, where, kind)


def _kind(value: Any) -> str:
    if isinstance(value, Pairs):
        return "object"
    return next(name for python, name in GO_KINDS if isinstance(value, python))


def _wrong(value: Any, struct: str, where: str, kind: str) -> Refusal:
    said = f"number {value!r}" if isinstance(value, float) and kind == "int" else _kind(value)
    return Refusal(400, f"json: cannot unmarshal {said} into Go struct field {GO_NAMES.get(struct, struct)}.{where} of type {kind}")
