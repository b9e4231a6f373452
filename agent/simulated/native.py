"""Ollama's own answers, byte for byte: lines, whole answers, errors, lists.

Decides field order and which fields are left out. Never knows when anything is sent.
"""

from collections.abc import Callable, Sequence
from typing import Any, Final

import msgspec

from agent.simulated.answers import Piece, as_double, go_json, go_time, logprobs, token_ids, vector
from agent.simulated.asking import Ask
from agent.simulated.models import SimulatedModel
from agent.simulated.names import MODELS_PATH, quoted
from agent.simulated.reading import Refusal

JSON_TYPE: Final = "application/json; charset=utf-8"
BARE_JSON_TYPE: Final = "application/json"
NDJSON_TYPE: Final = "application/x-ndjson"
ZERO_TIME: Final = "0001-01-01T00:00:00Z"

BLOCK: Final = ("attn_k", "attn_norm", "attn_output", "attn_q", "attn_v", "ffn_down", "ffn_gate", "ffn_norm", "ffn_up")
TENSORS: Final = ("output", "output_norm", "token_embd", *(f"blk.{number}.{name}" for number in range(2) for name in BLOCK))

Wall = Callable[[], int]
"""Nanoseconds since 1970 UTC."""


class Figures(msgspec.Struct, frozen=True, kw_only=True):
    """Counts and nanoseconds of the last line. Zeros are left out."""

    total_ns: int
    load_ns: int
    prompt_tokens: int
    prompt_ns: int
    eval_tokens: int
    eval_ns: int

    def fields(self) -> dict[str, int]:
        """As the last line has them."""
        named = {
            "total_duration": self.total_ns,
            "load_duration": self.load_ns,
            "prompt_eval_count": self.prompt_tokens,
            "prompt_eval_duration": self.prompt_ns,
            "eval_count": self.eval_tokens,
            "eval_duration": self.eval_ns,
        }
        return {name: value for name, value in named.items() if value}


class NativeWriter:
    """Writes the answers of one request to `/api/generate` or `/api/chat`."""

    stream_type: str = NDJSON_TYPE
    whole_type: str = JSON_TYPE

    def __init__(self, ask: Ask, wall: Wall, *, chat: bool = False) -> None:
        self._ask = ask
        self._wall = wall
        self._chat = chat
        self._held: list[Piece] = []

    def _start(self) -> dict[str, Any]:
        return {"model": self._ask.spelling, "created_at": go_time(self._wall())}

    def _said(self, pieces: Sequence[Piece]) -> dict[str, Any]:
        content = "".join(piece.content for piece in pieces)
        thinking = "".join(piece.thinking for piece in pieces)
        calls = [call for piece in pieces for call in piece.calls]
        if not self._chat:
            return {"response": content, **({"thinking": thinking} if thinking else {})}
        message: dict[str, Any] = {"role": "assistant", "content": content}
        if thinking:
            message["thinking"] = thinking
        if calls:
            message["tool_calls"] = calls
        return {"message": message}

    def _logprobs(self, pieces: Sequence[Piece]) -> dict[str, Any]:
        top = self._ask.logprobs
        return {} if top is None or not pieces else {"logprobs": logprobs(pieces, top)}

    def piece(self, piece: Piece) -> list[bytes]:
        """The line of one token. On the native path calls wait for the last one."""
        if piece.calls and self._ask.model.native:
            self._held.append(piece)
            return []
        return [go_json({**self._start(), **self._said([piece]), "done": False, **self._logprobs([piece])}) + b"\n"]

    def last(self, pieces: Sequence[Piece], reason: str, figures: Figures) -> list[bytes]:
        """The line that ends a stream."""
        return [go_json(self._final(self._held, pieces, reason, figures)) + b"\n"]

    def whole(self, pieces: Sequence[Piece], reason: str, figures: Figures) -> bytes:
        """The answer in one."""
        return go_json(self._final(pieces, pieces, reason, figures))

    def _final(self, said: Sequence[Piece], pieces: Sequence[Piece], reason: str, figures: Figures) -> dict[str, Any]:
        out = {**self._start(), **self._said(said), "done": True, "done_reason": reason}
        if self._chat:
            return {**out, **self._logprobs(said), **figures.fields()}
        if not self._ask.raw:
            text = self._ask.question.prompt + "".join(piece.content for piece in pieces)
            out["context"] = token_ids(text, self._ask.prompt_tokens + len(pieces))
        return {**out, **figures.fields(), **self._logprobs(said)}

    def unfinished(self, pieces: Sequence[Piece]) -> bytes:
        """A whole answer whose runner ended without saying so; without tokens it is the blank one of year 0001."""
        if pieces:
            return go_json({**self._start(), **self._said(pieces), "done": False})
        said = {"message": {"role": "", "content": ""}} if self._chat else {"response": ""}
        return go_json({"model": "", "created_at": ZERO_TIME, **said, "done": False})

    def loaded(self, reason: str) -> bytes:
        """The answer to a request that only loads or unloads."""
        return go_json({**self._start(), **self._said([]), "done": True, "done_reason": reason})

    def rendered(self) -> bytes:
        """The answer to `_debug_render_only`."""
        info = {"rendered_template": self._ask.question.prompt}
        return go_json({**self._start(), **self._said([]), "done": False, "_debug_info": info})

    def stream_error(self, text: str) -> list[bytes]:
        """What a stream that fails after its first token says last."""
        return [go_json({"error": text}) + b"\n"]


def refused(refusal: Refusal, *, stream: bool) -> tuple[str, bytes]:
    """Content type and body of an error before the first token."""
    return BARE_JSON_TYPE if stream and not refusal.early else JSON_TYPE, go_json({"error": refusal.text})


def embedded(ask: Ask, figures: Figures) -> bytes:
    """The answer of `/api/embed`."""
    vectors = [vector(ask.model, text, ask.dimensions) for text in ask.inputs]
    named = {"total_duration": figures.total_ns, "load_duration": figures.load_ns, "prompt_eval_count": figures.prompt_tokens}
    return go_json({"model": ask.spelling, "embeddings": vectors, **(named if vectors else {})})


def embedding(ask: Ask) -> bytes:
    """The answer of `/api/embeddings`."""
    vectors = [vector(ask.model, text, None) for text in ask.inputs]
    return go_json({"embedding": [as_double(value) for value in vectors[0]] if vectors else []})


def tags(models: Sequence[SimulatedModel]) -> bytes:
    """The answer of `/api/tags`."""
    rows = [
        {
            "name": model.name,
            "model": model.name,
            "modified_at": model.modified_at,
            "size": model.size_bytes,
            "digest": model.hex_digest,
            "details": model.details(lengths=True),
            "capabilities": list(model.capabilities),
        }
        for model in models
    ]
    return go_json({"models": rows})


def ps_row(model: SimulatedModel, *, size_bytes: int, in_memory_bytes: int, context: int, expires_at: str) -> dict[str, Any]:
    """A row of `/api/ps`."""
    return {
        "name": model.name,
        "model": model.name,
        "size": size_bytes,
        "digest": model.hex_digest,
        "details": model.details(lengths=False),
        "expires_at": expires_at,
        "size_vram": in_memory_bytes,
        "context_length": context,
    }


def show(model: SimulatedModel, *, verbose: bool) -> bytes:
    """The answer of `/api/show`."""
    family = model.family
    length = 64 if verbose else 0
    info: dict[str, Any] = {
        "general.architecture": family,
        "general.file_type": 15,
        "general.parameter_count": model.size_bytes // 2,
        "general.quantization_version": 2,
        f"{family}.attention.head_count": 4,
        f"{family}.attention.head_count_kv": 4,
        f"{family}.attention.layer_norm_rms_epsilon": 1e-05,
        f"{family}.block_count": 2,
        f"{family}.context_length": model.context_length,
        f"{family}.embedding_length": model.embedding_length,
        f"{family}.feed_forward_length": model.embedding_length * 2,
        f"{family}.rope.dimension_count": 16,
        f"{family}.vocab_size": 1834,
        "tokenizer.ggml.add_bos_token": True,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.scores": [-number for number in range(length)] or None,
        "tokenizer.ggml.token_type": [1] * length or None,
        "tokenizer.ggml.tokens": [f"word{number}" for number in range(length)] or None,
        "tokenizer.ggml.unknown_token_id": 0,
    }
    said: dict[str, Any] = {"license": "\n".join(model.license)} if model.license else {}
    said["modelfile"] = modelfile(model)
    if model.parameters:
        said["parameters"] = "\n".join(f"{name:30} {shown}" for name, shown in _parameters(model, marks=True))
    said["template"] = model.template
    if model.system:
        said["system"] = model.system
    said["details"] = model.details(lengths=False)
    if model.messages:
        said["messages"] = [{"role": role, "content": content} for role, content in model.messages]
    said["model_info"] = info
    said["tensors"] = [{"name": f"{name}.weight", "type": "F16", "shape": [model.embedding_length]} for name in TENSORS]
    return go_json({**said, "capabilities": list(model.capabilities), "modified_at": model.modified_at})


def _parameters(model: SimulatedModel, *, marks: bool) -> list[tuple[str, str]]:
    """One pair for each value; `marks` puts texts into quotation marks."""
    pairs = []
    for name, value in model.parameters.items():
        for item in value if isinstance(value, list) else [value]:
            text = (quoted(item) if marks else item) if isinstance(item, str) else go_json(item).decode()
            pairs.append((name, text))
    return pairs


def modelfile(model: SimulatedModel) -> str:
    """The file that would make `model`."""
    lines = [
        '# Modelfile generated by "ollama show"',
        "# To build a new Modelfile based on this, replace FROM with:",
        f"# FROM {model.name}",
        "",
        f"FROM {MODELS_PATH}/blobs/sha256-{model.all_layers[0].digest}",
        f"TEMPLATE {model.template}",
        *([f"SYSTEM {model.system}"] if model.system else []),
        *(f"PARAMETER {name} {value}" for name, value in _parameters(model, marks=False)),
        *(f"LICENSE {text}" for text in model.license),
        *(f"MESSAGE {role} {content}" for role, content in model.messages),
    ]
    return "\n".join(lines) + "\n"
