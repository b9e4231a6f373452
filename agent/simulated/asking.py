"""What a request asks for: validated as Ollama does it, in its order and words.

Decides whether a request is served, and what of it matters for the answer and for the scheduler. Knows neither sockets nor time.
"""

import base64
import binascii
import hashlib
import re
from collections.abc import Callable
from typing import Any, Final

import msgspec

from agent.simulated.answers import Question, go_json
from agent.simulated.models import Knobs, SimulatedModel
from agent.simulated.names import parse_name
from agent.simulated.reading import Refusal

THINK_LEVELS: Final = ("high", "medium", "low", "max")
THINK_WORDS: Final = '"high", "medium", "low", "max", true, or false'
RUNNER_INTEGERS: Final = ("num_ctx", "num_batch", "num_gpu", "main_gpu", "num_thread", "draft_num_predict")
INTEGERS: Final = (*RUNNER_INTEGERS, "num_keep", "seed", "num_predict", "top_k", "repeat_last_n")
FLOATS: Final = ("top_p", "min_p", "typical_p", "temperature", "repeat_penalty", "presence_penalty", "frequency_penalty")
UNITS_S: Final = {"ns": 1e-9, "us": 1e-6, "µs": 1e-6, "μs": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0}
DURATION_PART: Final = re.compile(r"(\d+\.?\d*|\.\d+)([^\d.]*)")
IMAGE_TOKENS: Final = 256
LEAST_CONTEXT: Final = 4
CONVERSATION_CHARACTERS: Final = 200
"""Prompts that start with so many equal characters count as one conversation for the prompt cache."""

NO_VISION: Final = (
    '{"error":{"code":400,"message":"Multimodal data provided, but model does not support multimodal requests.",'
    '"type":"invalid_request_error"}}'
)
NO_EMBEDDINGS: Final = "This server does not support embeddings. Start it with `--embeddings`"
TOO_LONG: Final = (
    "the prompt is longer than the context length currently available to the model; shorten the prompt, "
    "adjust the context length in settings, or use a model with a longer context length"
)

Finder = Callable[[str], SimulatedModel | None]


class Ask(msgspec.Struct, frozen=True, kw_only=True):
    """One request that is going to be served."""

    spelling: str  # the model's name as the client wrote it
    model: SimulatedModel
    purpose: str = "answer"  # answer, embed, load, unload, render
    question: Question
    stream: bool = True
    keep_alive_s: float | None = None
    num_ctx: int | None = None
    runner_options: str = ""
    prompt_tokens: int = 0
    conversation: str = ""
    raw: bool = False
    logprobs: int | None = None  # how many alternatives; None: none are asked for
    inputs: tuple[str, ...] = ()
    dimensions: int | None = None
    base64: bool = False  # embeddings as base64
    runner_error: Refusal | None = None  # what the runner says once it is there
    include_usage: bool = False
    estimated_tokens: int = 0  # of the prompt, where a stream begins with a guess
    echo: dict[str, Any] = {}  # what the answer repeats of its request


def known_model(spelling: str, find: Finder, *, missing: str) -> SimulatedModel:
    """The model, or `Refusal`. `missing` is the text for an unknown one."""
    if not spelling.strip():
        raise Refusal(404, missing.format(spelling))
    parse_name(spelling)
    model = find(spelling)
    if model is None:
        raise Refusal(404, missing.format(spelling))
    return model


def keep_alive_s(value: Any) -> float | None:
    """Seconds, negative for ever, None where not set. Raises `Refusal` (400) in Go's words."""
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        raise Refusal(400, f"Unsupported type: '{'bool' if isinstance(value, bool) else type(value).__name__}'")
    seconds = duration_s(value) if isinstance(value, str) else float(value)
    return seconds if seconds >= 0 else -1.0


def duration_s(text: str) -> float:
    """A Go duration such as `1h30m` in seconds."""
    rest = text[1:] if text[:1] in ("-", "+") else text
    if rest == "0":
        return 0.0
    seconds = 0.0
    at = 0
    while at < len(rest):
        part = DURATION_PART.match(rest, at)
        if part is None:
            raise Refusal(400, f'time: invalid duration "{text}"')
        if not part[2]:
            raise Refusal(400, f'time: missing unit in duration "{text}"')
        if part[2] not in UNITS_S:
            raise Refusal(400, f'time: unknown unit "{part[2]}" in duration "{text}"')
        seconds += float(part[1]) * UNITS_S[part[2]]
        at = part.end()
    if not rest:
        raise Refusal(400, f'time: invalid duration "{text}"')
    return -seconds if text[0] == "-" else seconds


def checked_think(value: Any) -> bool | None:
    """On, off, or not said."""
    if value is None or isinstance(value, bool):
        return value
    if not isinstance(value, str):
        raise Refusal(400, f"think must be a boolean or string ({THINK_WORDS})")
    if value not in THINK_LEVELS:
        raise Refusal(400, f'invalid think value: "{value}" (must be {THINK_WORDS})')
    return True


def checked_options(options: dict[str, Any]) -> dict[str, Any]:
    """`options` with the types that Ollama insists on. Raises `Refusal` (500)."""
    out: dict[str, Any] = {}
    for name, value in options.items():
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if value is None:
            continue
        if name in INTEGERS:
            if not number:
                raise Refusal(500, f'option "{name}" must be of type integer')
            out[name] = max(LEAST_CONTEXT, int(value)) if name == "num_ctx" else int(value)
        elif name in FLOATS:
            if not number:
                raise Refusal(500, f'option "{name}" must be of type float32')
            out[name] = float(value)
        elif name == "use_mmap":
            if not isinstance(value, bool):
                raise Refusal(500, f'option "{name}" must be of type boolean')
            out[name] = value
        elif name == "stop":
            if not isinstance(value, list):
                raise Refusal(500, f'option "{name}" must be of type array')
            out[name] = tuple(str(item) for item in value)
    return out


def checked_format(value: Any) -> tuple[Any, Refusal | None]:
    """The schema, or what the runner says to a `format` that is none."""
    if value in (None, ""):
        return None, None
    if value == "json" or isinstance(value, dict):
        return value, None
    shown = go_json(go_json(value).decode()).decode()
    return None, Refusal(500, f'invalid format: {shown}; expected "json" or a valid JSON Schema object', early=False)


def check_images(images: list[str]) -> None:
    """Raises `Refusal` (400) unless all are base64."""
    for image in images:
        try:
            base64.b64decode(image, validate=True)
        except binascii.Error:
            at = re.search(r"[^A-Za-z0-9+/=]", image)
            raise Refusal(400, f"illegal base64 data at input byte {at.start() if at else len(image)}") from None


def ask_generate(fields: dict[str, Any], find: Finder, knobs: Knobs) -> Ask:
    """What a generate request asks for."""
    check_images(fields.get("images", []))
    think = checked_think(fields.get("think"))
    keep = keep_alive_s(fields.get("keep_alive"))
    spelling = fields.get("model", "")
    model = known_model(spelling, find, missing="model '{}' not found")
    top = _top_logprobs(fields)
    prompt, raw = fields.get("prompt", ""), bool(fields.get("raw"))
    if raw and (fields.get("template") or fields.get("system") or fields.get("context")):
        raise Refusal(400, "raw mode does not support template, system, or context")
    if not prompt and keep == 0:
        return Ask(spelling=spelling, model=model, purpose="unload", question=Question(model=model, prompt=""))
    if not model.can("completion"):
        raise Refusal(400, f'"{spelling}" does not support generate')
    if think and not model.can("thinking"):
        raise Refusal(400, f'"{spelling}" does not support thinking')
    if fields.get("suffix") and not model.can("insert"):
        raise Refusal(400, f"{model.full_name} does not support insert")
    options = checked_options({**model.parameters, **fields.get("options", {})})
    template = fields.get("template", "")
    if template.count("{{") != template.count("}}"):
        raise Refusal(500, "template: :1: unclosed action")
    system = fields.get("system", "")
    read = "".join((system, "\n" if system else "", prompt, fields.get("suffix", "")))
    purpose = "render" if fields.get("_debug_render_only") else "answer" if prompt else "load"
    tokens = model.tokens(read) + len(fields.get("context", []))
    ask = _ask(fields, knobs, model, options, purpose=purpose, read=read, last=prompt, think=think, keep=keep, top=top, tokens=tokens)
    if model.native:  # llama.cpp tells thinking from speaking in chats alone
        ask = msgspec.structs.replace(ask, question=msgspec.structs.replace(ask.question, think=False))
    return msgspec.structs.replace(ask, raw=raw)


def ask_chat(fields: dict[str, Any], find: Finder, knobs: Knobs) -> Ask:
    """What a chat request asks for."""
    messages: list[dict[str, Any]] = fields.get("messages", [])
    for message in messages:
        check_images(message.get("images", []))
    think = checked_think(fields.get("think"))
    keep = keep_alive_s(fields.get("keep_alive"))
    spelling = fields.get("model", "")
    if not spelling.strip():
        raise Refusal(400, "model is required")
    model = known_model(spelling, find, missing="model '{}' not found")
    top = _top_logprobs(fields)
    if not messages and keep == 0:
        return Ask(spelling=spelling, model=model, purpose="unload", question=Question(model=model, prompt=""))
    if not model.can("completion"):
        raise Refusal(400, f'"{spelling}" does not support chat')
    if fields.get("tools") and not model.can("tools"):
        raise Refusal(400, f"{model.full_name} does not support tools")
    if think and not model.can("thinking"):
        raise Refusal(400, f'"{spelling}" does not support thinking')
    options = checked_options({**model.parameters, **fields.get("options", {})})
    asked = messages[-1] if messages else {}
    begun = asked.get("content", "") if asked.get("role", "").lower() == "assistant" and not asked.get("tool_calls") else ""
    heard = messages[:-1] if begun else messages
    read = "\n".join(f"{message.get('role', '')}: {message.get('content', '')}" for message in heard)
    last = asked.get("content", "") if asked.get("role", "").lower() == "user" else ""
    purpose = "render" if fields.get("_debug_render_only") else "answer" if messages else "load"
    tokens = model.tokens("".join(message.get("content", "") for message in messages))
    ask = _ask(fields, knobs, model, options, purpose=purpose, read=read, last=last, think=think, keep=keep, top=top, tokens=tokens)
    return msgspec.structs.replace(ask, question=msgspec.structs.replace(ask.question, begun=begun)) if begun else ask


def _top_logprobs(fields: dict[str, Any]) -> int:
    top: int = fields.get("top_logprobs", 0)
    if not 0 <= top <= 20:
        raise Refusal(400, "top_logprobs must be between 0 and 20")
    return top


def _ask(
    fields: dict[str, Any],
    knobs: Knobs,
    model: SimulatedModel,
    options: dict[str, Any],
    *,
    purpose: str,
    read: str,
    last: str,
    think: bool | None,
    keep: float | None,
    top: int,
    tokens: int,
) -> Ask:
    """What generate and chat have in common."""
    schema, error = checked_format(fields.get("format"))
    images = len(fields.get("images", [])) + sum(len(message.get("images", [])) for message in fields.get("messages", []))
    if images and not model.can("vision") and not model.scripted:
        error = Refusal(400, NO_VISION, early=False)
    context = min(options.get("num_ctx") or knobs.context, model.context_length)
    if tokens > context:
        error = error or _overflow(fields, tokens, context)
        tokens = context
    limit = options.get("num_predict", -1)
    runner_options = sorted((name, value) for name, value in options.items() if name in RUNNER_INTEGERS[1:] or name == "use_mmap")
    if not fields.get("shift", True):
        runner_options.append(("shift", False))
    question = Question(
        model=model,
        prompt=read,
        last_message=last,
        seed=options.get("seed"),
        limit=limit if limit >= 0 else None,
        stop=options.get("stop", ()),
        think=model.can("thinking") and think is not False,
        tools=tuple(fields.get("tools", ())),
        schema=schema,
    )
    return Ask(
        spelling=fields["model"],
        model=model,
        purpose=purpose,
        question=question,
        stream=fields.get("stream", True),
        keep_alive_s=keep,
        num_ctx=options.get("num_ctx"),
        runner_options=repr(runner_options) if runner_options else "",
        prompt_tokens=tokens + images * IMAGE_TOKENS,
        conversation=hashlib.sha256(read[:CONVERSATION_CHARACTERS].encode("utf-8", "replace")).hexdigest(),
        logprobs=top if fields.get("logprobs") else None,
        runner_error=error,
    )


def _overflow(fields: dict[str, Any], tokens: int, context: int) -> Refusal | None:
    """What comes of a prompt that does not fit: it is cut, unless the client forbids it."""
    if not fields.get("truncate", True):
        text = f"request ({tokens} tokens) exceeds the available context size ({context} tokens), try increasing it"
        error = {"code": 400, "message": text, "type": "exceed_context_size_error", "n_prompt_tokens": tokens, "n_ctx": context}
        return Refusal(400, go_json({"error": error}).decode(), early=False)
    if not fields.get("shift", True):
        return Refusal(400, TOO_LONG, early=False)
    return None


def ask_embed(fields: dict[str, Any], find: Finder, knobs: Knobs) -> Ask:
    """What an embed request asks for."""
    keep = keep_alive_s(fields.get("keep_alive"))
    given = fields.get("input")
    inputs = [given] if isinstance(given, str) else [] if given is None else given
    if not isinstance(inputs, list) or not all(isinstance(text, str) for text in inputs):
        raise Refusal(400, "invalid input type")
    spelling = fields.get("model", "")
    model = known_model(spelling, find, missing='model "{}" not found, try pulling it first')
    return _ask_embedding(fields, knobs, model, [text for text in inputs if text or len(inputs) > 1], keep, error_status=501)


def ask_embeddings(fields: dict[str, Any], find: Finder, knobs: Knobs) -> Ask:
    """What a request of the old kind for one embedding asks for."""
    keep = keep_alive_s(fields.get("keep_alive"))
    spelling = fields.get("model", "")
    if not spelling.strip():
        raise Refusal(400, "model is required")
    model = known_model(spelling, find, missing='model "{}" not found, try pulling it first')
    prompt = fields.get("prompt", "")
    return _ask_embedding(fields, knobs, model, [prompt] if prompt else [], keep, error_status=500)


def _ask_embedding(
    fields: dict[str, Any], knobs: Knobs, model: SimulatedModel, inputs: list[str], keep: float | None, *, error_status: int
) -> Ask:
    options = checked_options({**model.parameters, **fields.get("options", {})})
    context = min(options.get("num_ctx") or knobs.context, model.context_length)
    lengths = [model.tokens(text) for text in inputs]
    error = None
    if model.can("completion"):
        error = Refusal(error_status, NO_EMBEDDINGS)
    elif not fields.get("truncate", True) and any(length > context for length in lengths):
        error = Refusal(400, "the input length exceeds the context length")
    return Ask(
        spelling=fields["model"],
        model=model,
        purpose="embed" if inputs else "load",
        question=Question(model=model, prompt=""),
        stream=False,
        keep_alive_s=keep,
        num_ctx=options.get("num_ctx"),
        prompt_tokens=sum(min(length, context) for length in lengths),
        inputs=tuple(inputs),
        dimensions=fields.get("dimensions") or None,
        runner_error=error if inputs else None,
    )
