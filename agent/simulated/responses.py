"""OpenAI's Responses route: translated to a chat request, answered by the same machine, written down their way.

Decides items, events and their numbers; never when anything is sent. Nothing is stored, so an earlier response cannot be gone on with:
what asks for one is answered as if it had not.

Invariant: events of one stream are numbered from 0 without a gap; the objects in them have sorted keys, as Go writes maps, and a
whole answer has its fields in the order of the API.
"""

from collections.abc import Sequence
from typing import Any, Final

import msgspec

from agent.simulated.answers import Piece, dice_for, go_json
from agent.simulated.asking import Ask, Finder, ask_chat
from agent.simulated.models import Knobs
from agent.simulated.native import BARE_JSON_TYPE, Figures, Wall
from agent.simulated.openai import TranslationError, checked_effort

IDS: Final = 999_999
ZERO_SECONDS: Final = -62_135_596_800
"""Year 1: what Ollama calls the time of an answer without any token."""


class _AsGiven(dict[str, Any]):
    """An object that is passed on as the client wrote it."""


def _sorted(value: Any) -> Any:
    """`value` with the keys of its objects in order."""
    if isinstance(value, _AsGiven):
        return value
    if isinstance(value, dict):
        return {key: _sorted(value[key]) for key in sorted(value)}
    return [_sorted(item) for item in value] if isinstance(value, list) else value


def _parts(content: Any) -> tuple[str, list[str]]:
    """Text and images of a message."""
    if isinstance(content, str):
        return content, []
    text, images = "", []
    for part in content if isinstance(content, list) else []:
        match part.get("type") if isinstance(part, dict) else None:
            case "input_text" | "output_text" | "text":
                text += str(part.get("text", ""))
            case "input_image":
                address = str(part.get("image_url", ""))
                if not address.startswith("data:"):
                    raise TranslationError("image URLs are not currently supported, please use base64 encoded data instead")
                images.append(address.partition(",")[2])
            case _:  # what it does not know it does not read
                pass
    return text, images


def _messages(fields: dict[str, Any]) -> list[dict[str, Any]]:
    given = fields.get("input")
    instructions = fields.get("instructions")
    messages: list[dict[str, Any]] = [{"role": "system", "content": instructions}] if instructions else []
    if isinstance(given, str):
        return [*messages, {"role": "user", "content": given}] if given else messages
    for item in given if isinstance(given, list) else []:
        if not isinstance(item, dict):
            raise TranslationError("invalid input item")
        match item.get("type", "message"):
            case "message":
                text, images = _parts(item.get("content"))
                role = item.get("role", "")
                messages.append({"role": "system" if role == "developer" else role, "content": text, "images": images})
            case "function_call":
                called = {"name": item.get("name", ""), "arguments": item.get("arguments", "")}
                messages.append({"role": "assistant", "content": "", "tool_calls": [{"id": item.get("call_id"), "function": called}]})
            case "function_call_output":
                text, images = _parts(item.get("output", ""))
                messages.append({"role": "tool", "content": text, "images": images, "tool_call_id": item.get("call_id", "")})
            case "reasoning":
                messages.append({"role": "assistant", "content": "", "thinking": str(item.get("encrypted_content", ""))})
            case _:
                pass
    return messages


def _functions(tools: list[Any]) -> list[dict[str, Any]]:
    """The functions among `tools`, those in namespaces too."""
    out: list[dict[str, Any]] = []
    for tool in tools:
        if not isinstance(tool, dict):
            continue
        if tool.get("type") == "namespace":
            out += _functions(tool.get("tools") or [])
        elif tool.get("type") == "function":
            out.append(tool)
    return out


def _shown_tool(tool: Any) -> Any:
    if not isinstance(tool, dict) or tool.get("type") != "function":
        return tool
    shown = {"type": "function", "name": tool.get("name", ""), "description": tool.get("description"), "strict": tool.get("strict")}
    return {**shown, "parameters": _sorted(tool.get("parameters"))}


def ask_response(fields: dict[str, Any], find: Finder, knobs: Knobs) -> Ask:
    """What a request to `/v1/responses` asks for."""
    effort = checked_effort(fields.get("reasoning", {}).get("effort"))
    options = {"temperature": fields.get("temperature", 1.0), "top_p": fields.get("top_p", 1.0)}
    if "max_output_tokens" in fields:
        options["num_predict"] = fields["max_output_tokens"]
    form = fields.get("text", {}).get("format")
    functions = _functions(fields.get("tools", []))
    native = {
        "model": fields.get("model", ""),
        "messages": _messages(fields),
        "stream": bool(fields.get("stream")),
        "options": options,
        "think": effort,
        "format": form.get("schema") if isinstance(form, dict) and form.get("type") == "json_schema" else None,
        "tools": [{"type": "function", "function": tool} for tool in functions],
    }
    return msgspec.structs.replace(ask_chat(native, find, knobs), echo=_echo(fields))


def _echo(fields: dict[str, Any]) -> dict[str, Any]:
    """What every answer repeats of its request, in the order of the API."""
    form = fields.get("text", {}).get("format")
    shown: dict[str, Any] = {"type": "text"}
    if isinstance(form, dict) and form.get("type") in ("json_schema", "json_object"):
        shown = {name: form[name] for name in ("type", "name", "schema", "strict") if name in form}
        if isinstance(shown.get("schema"), dict):
            shown["schema"] = _AsGiven(shown["schema"])
    reasoning = {name: fields.get("reasoning", {}).get(name) for name in ("effort", "summary")}
    return {
        "model": fields.get("model", ""),
        "instructions": fields.get("instructions") or None,
        "tools": [_shown_tool(tool) for tool in fields.get("tools", [])],
        "truncation": fields.get("truncation") or "disabled",
        "text": {"format": shown},
        "top_p": fields.get("top_p", 1),
        "temperature": fields.get("temperature", 1),
        "reasoning": {name: value for name, value in reasoning.items() if value} or None,
        "max_output_tokens": fields.get("max_output_tokens"),
    }


def _output_text(text: str) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


def _arguments(call: dict[str, Any]) -> str:
    return go_json(call["function"]["arguments"]).decode()


class ResponsesWriter:
    """Writes the answers of one request to `/v1/responses`. An event is one write."""

    stream_type: str = "text/event-stream"
    whole_type: str = BARE_JSON_TYPE

    def __init__(self, ask: Ask, wall: Wall) -> None:
        self._echo = ask.echo
        self._wall = wall
        dice = dice_for(ask.question.prompt, wall())
        self._id, self._message_id, self._reasoning_id, self._call_id = (dice.randrange(IDS) for _ in range(4))
        self._created = wall() // 1_000_000_000
        self._number = -1
        self._index = 0  # where the next item goes
        self._thinking = self._text = ""
        self._reasoning: dict[str, Any] | None = None  # the item, once it is whole
        self._calls: list[dict[str, Any]] = []
        self._text_begun = False

    def _event(self, kind: str, **fields: Any) -> bytes:
        self._number += 1
        said = _sorted({"type": kind, "sequence_number": self._number, **fields})
        return f"event: {kind}\n".encode() + b"data: " + go_json(said) + b"\n\n"

    def _response(self, status: str, output: Any, *, created: int, completed: int | None, usage: dict[str, Any] | None) -> dict[str, Any]:
        echo = self._echo
        return {
            "id": f"resp_{self._id}",
            "object": "response",
            "created_at": created,
            "completed_at": completed,
            "status": status,
            "incomplete_details": None,
            "model": echo["model"],
            "previous_response_id": None,
            "instructions": echo["instructions"],
            "output": output,
            "error": None,
            "tools": echo["tools"],
            "tool_choice": "auto",
            "truncation": echo["truncation"],
            "parallel_tool_calls": True,
            "text": echo["text"],
            "top_p": echo["top_p"],
            "presence_penalty": 0,
            "frequency_penalty": 0,
            "top_logprobs": 0,
            "temperature": echo["temperature"],
            "reasoning": echo["reasoning"],
            "usage": usage,
            "max_output_tokens": echo["max_output_tokens"],
            "max_tool_calls": None,
            "store": False,
            "background": False,
            "service_tier": "default",
            "metadata": {},
            "safety_identifier": None,
            "prompt_cache_key": None,
        }

    def _begin(self) -> list[bytes]:
        if self._number >= 0:
            return []
        if self._echo["reasoning"]:  # as a map it has all its keys
            self._echo = {**self._echo, "reasoning": {"summary": None, **self._echo["reasoning"]}}
        response = self._response("in_progress", [], created=self._created, completed=None, usage=None)
        return [self._event("response.created", response=response), self._event("response.in_progress", response=response)]

    def piece(self, piece: Piece) -> list[bytes]:
        """The events of one token."""
        out = self._begin()
        if piece.thinking:
            out += self._think(piece.thinking)
        if piece.calls:
            out += self._end_thinking()
            for call in piece.calls:
                out += self._call(call)
        if piece.content:
            out += [*self._end_thinking(), *self._say(piece.content)]
        return out

    def _think(self, text: str) -> list[bytes]:
        item_id, out = f"rs_{self._reasoning_id}", []
        if not self._thinking:
            item = {"id": item_id, "type": "reasoning", "summary": []}
            out.append(self._event("response.output_item.added", output_index=self._index, item=item))
        self._thinking += text
        where = {"item_id": item_id, "output_index": self._index, "summary_index": 0}
        return [*out, self._event("response.reasoning_summary_text.delta", **where, delta=text)]

    def _end_thinking(self) -> list[bytes]:
        if not self._thinking or self._reasoning is not None:
            return []
        self._reasoning = _reasoning_item(f"rs_{self._reasoning_id}", self._thinking)
        where = {"item_id": f"rs_{self._reasoning_id}", "output_index": self._index, "summary_index": 0}
        done = self._event("response.reasoning_summary_text.done", **where, text=self._thinking)
        out = [done, self._event("response.output_item.done", output_index=self._index, item=self._reasoning)]
        self._index += 1
        return out

    def _call(self, call: dict[str, Any]) -> list[bytes]:
        """The events of a call. A text before it is left open, and its place is taken again."""
        at, item_id = self._index + len(self._calls), f"fc_{self._call_id}_{len(self._calls)}"
        arguments = _arguments(call)
        item = _call_item(item_id, call)
        self._calls.append(item)
        where = {"item_id": item_id, "output_index": at}
        return [
            self._event("response.output_item.added", output_index=at, item={**item, "status": "in_progress", "arguments": ""}),
            self._event("response.function_call_arguments.delta", **where, delta=arguments),
            self._event("response.function_call_arguments.done", **where, arguments=arguments),
            self._event("response.output_item.done", output_index=at, item=item),
        ]

    def _say(self, text: str) -> list[bytes]:
        where = {"item_id": f"msg_{self._message_id}", "output_index": self._index, "content_index": 0}
        out = []
        if not self._text_begun:
            self._text_begun = True
            item = {**self._message(""), "status": "in_progress", "content": []}
            out = [
                self._event("response.output_item.added", output_index=self._index, item=item),
                self._event("response.content_part.added", **where, part=_output_text("")),
            ]
        self._text += text
        return [*out, self._event("response.output_text.delta", **where, delta=text, logprobs=[])]

    def _message(self, text: str) -> dict[str, Any]:
        said = {"id": f"msg_{self._message_id}", "type": "message", "status": "completed", "role": "assistant"}
        return {**said, "content": [_output_text(text)]}

    def last(self, pieces: Sequence[Piece], reason: str, figures: Figures) -> list[bytes]:
        """The events that end a stream."""
        out = [*self._begin(), *self._end_thinking()]
        message = self._message(self._text)
        if self._text_begun and not self._calls:
            where = {"item_id": message["id"], "output_index": self._index, "content_index": 0}
            out += [
                self._event("response.output_text.done", **where, text=self._text, logprobs=[]),
                self._event("response.content_part.done", **where, part=_output_text(self._text)),
                self._event("response.output_item.done", output_index=self._index, item=message),
            ]
        thought = [self._reasoning] if self._reasoning is not None else []
        output = [*thought, *self._calls, *([message] if self._text_begun else [])]
        usage = _usage(figures.prompt_tokens, figures.eval_tokens)
        now = self._wall() // 1_000_000_000
        response = self._response("completed", output or None, created=self._created, completed=now, usage=usage)
        return [*out, self._event("response.completed", response=response)]

    def whole(self, pieces: Sequence[Piece], reason: str, figures: Figures) -> bytes:
        """The answer in one. A length limit is not told."""
        return self._whole(pieces, figures.prompt_tokens, figures.eval_tokens, self._created)

    def unfinished(self, pieces: Sequence[Piece]) -> bytes:
        """A whole answer whose runner ended without saying so: it looks like any other."""
        return self._whole(pieces, 0, 0, self._created if pieces else ZERO_SECONDS)

    def _whole(self, pieces: Sequence[Piece], prompt_tokens: int, eval_tokens: int, created: int) -> bytes:
        thinking = "".join(piece.thinking for piece in pieces)
        calls = [call for piece in pieces for call in piece.calls]
        output = [_reasoning_item(f"rs_resp_{self._id}", thinking)] if thinking else []
        if calls:
            output += [_call_item(f"fc_resp_{self._id}_{at}", call) for at, call in enumerate(calls)]
        else:
            output.append(self._message("".join(piece.content for piece in pieces)))
        now = self._wall() // 1_000_000_000
        usage = _usage(prompt_tokens, eval_tokens)
        return go_json(self._response("completed", output, created=created, completed=now, usage=usage)) + b"\n"

    def loaded(self, reason: str) -> bytes:
        """The answer to a request without input."""
        return self._whole([], 0, 0, self._created)

    def rendered(self) -> bytes:
        """There is no such request on this route."""
        raise NotImplementedError

    def stream_error(self, text: str) -> list[bytes]:
        """A failure after the first token: nothing is said."""
        return []


def _reasoning_item(item_id: str, text: str) -> dict[str, Any]:
    summary = [{"type": "summary_text", "text": text}]
    return {"id": item_id, "type": "reasoning", "summary": summary, "encrypted_content": text}


def _call_item(item_id: str, call: dict[str, Any]) -> dict[str, Any]:
    said = {"id": item_id, "type": "function_call", "status": "completed", "call_id": call["id"]}
    return {**said, "name": call["function"]["name"], "arguments": _arguments(call)}


def _usage(prompt_tokens: int, eval_tokens: int) -> dict[str, Any]:
    return {
        "input_tokens": prompt_tokens,
        "output_tokens": eval_tokens,
        "total_tokens": prompt_tokens + eval_tokens,
        "input_tokens_details": {"cached_tokens": 0},
        "output_tokens_details": {"reasoning_tokens": 0},
    }
