"""The models that a simulated Ollama has, and how fast it is with them.

Decides names, facts and speeds; never what an answer says or when. Three sets: `recorded_models` are those of the recorded
conversations with a real Ollama, `demo_nodes` are three machines to try the router with, and a bare name makes a model with
facts guessed from its tag (`guessed_model`).
"""

import hashlib
import re
from typing import Any, Final

import msgspec

from agent.simulated.names import Parts, display_name, full, literal_name
from core.simulation.node import ModelTiming, NodeTiming
from core.units import GIB

CONFIG_BYTES: Final = 148
SIZE_TAG: Final = re.compile(r"(\d+(?:\.\d+)?)([bm])(?![a-z])", re.IGNORECASE)


class Layer(msgspec.Struct, frozen=True):
    """One blob of a model."""

    digest: str  # 64 hex digits
    size_bytes: int


def text_layer(text: str) -> Layer:
    """The blob of a text."""
    return Layer(hashlib.sha256(text.encode("utf-8", "replace")).hexdigest(), len(text.encode("utf-8", "replace")))


class SimulatedModel(msgspec.Struct, frozen=True, kw_only=True):
    """One row of `/api/tags`, and the speeds of a machine of speed 1."""

    name: str
    size_bytes: int
    digest: str = ""  # 64 hex digits; derived from the name when empty
    weights: str = ""  # models with the same weights share a runner; the digest when empty
    family: str = "simulated"
    parameter_size: str = "1B"
    quantization: str = "Q4_K_M"
    context_length: int = 131_072
    embedding_length: int = 2048
    capabilities: tuple[str, ...] = ("completion",)
    modified_at: str = "2026-11-22T12:00:00Z"
    template: str = "{{ .Prompt }}"
    system: str = ""
    license: tuple[str, ...] = ()
    parameters: dict[str, Any] = {}
    messages: tuple[tuple[str, str], ...] = ()
    parent_model: str = ""
    layers: tuple[Layer, ...] = ()  # weights first, configuration last; made up from the other facts when empty
    native: bool = False  # its chat template is in the GGUF: llama.cpp writes its prompts and reads its calls
    scripted: bool = False  # it says what a `SCRIPT:name` in its prompt asks for
    context_bytes: int = 0
    decode_tokens_s: float = 50.0
    prefill_tokens_s: float = 1000.0
    characters_per_token: float = 4.0

    @property
    def hex_digest(self) -> str:
        """The digest as `/api/tags` shows it."""
        return self.digest or hashlib.sha256(self.name.lower().encode()).hexdigest()

    @property
    def full_name(self) -> str:
        """The name with host and namespace, as some errors show it."""
        return full(self.parts)

    @property
    def parts(self) -> Parts:
        """Host, namespace, model and tag."""
        parts = literal_name(self.name)
        assert parts is not None, f"a model must have a name that Ollama takes, {self.name!r} is none"
        return parts

    @property
    def all_layers(self) -> tuple[Layer, ...]:
        """Its blobs: weights, template, configuration. Their sizes add up to that of the model."""
        if self.layers:
            return self.layers
        config = Layer(hashlib.sha256(f"configuration {self.hex_digest}".encode()).hexdigest(), min(CONFIG_BYTES, self.size_bytes // 3))
        template = Layer(text_layer(self.template).digest, min(text_layer(self.template).size_bytes, self.size_bytes // 3))
        weights = hashlib.sha256(f"weights {self.weights or self.hex_digest}".encode()).hexdigest()
        return Layer(weights, self.size_bytes - template.size_bytes - config.size_bytes), template, config

    def can(self, capability: str) -> bool:
        """Whether `/api/show` lists `capability`."""
        return capability in self.capabilities

    def tokens(self, text: str) -> int:
        """How many tokens `text` is."""
        return int(len(text) / self.characters_per_token) + 2

    def details(self, *, lengths: bool) -> dict[str, Any]:
        """`details`: with the two lengths in tags, without in show and ps."""
        details: dict[str, Any] = {
            "parent_model": self.parent_model,
            "format": "gguf",
            "family": self.family,
            "families": [self.family],
            "parameter_size": self.parameter_size,
            "quantization_level": self.quantization,
        }
        if lengths:
            details |= {"context_length": self.context_length, "embedding_length": self.embedding_length}
        return details


class Knobs(msgspec.Struct, frozen=True, kw_only=True):
    """The machine and its settings. `speed` scales everything; the absolute values, where given, hold for every model."""

    slots: int = 1
    speed: float = 1.0
    seed: int = 0
    max_loaded: int = 3
    max_queue: int = 512
    memory_bytes: int = 24 * GIB
    keep_alive_s: float = 300.0
    context: int = 4096
    load_s: float | None = None
    load_bytes_s: float = 2e9
    unload_s: float = 0.0
    decode_tokens_s: float | None = None
    prefill_tokens_s: float | None = None
    batch_slope: float = 0.3
    prompt_cache: bool = True
    version: str = "0.33.0"
    check_host: bool = True
    disk_bytes: int | None = None  # of the blobs; None: no end
    startup_s: float = 0.0  # the port is open, nothing is answered
    tags_s: float = 0.0  # how long after the start lists are answered
    hash_bytes_s: float = 1.5e9  # how fast what was pulled is verified
    noprune: bool = False  # a pull leaves the layers that it replaces
    separate_finish: bool = True  # the OpenAI stream's last chunk is one of its own, as it is since 0.32.6
    answer_tokens: int | None = None  # how long an answer is when the request sets no limit
    banner: bool = True  # say in a header that this is a simulation

    def node_timing(self) -> NodeTiming:
        """What the timing machine needs to know of the node."""
        return NodeTiming(
            slots=self.slots,
            max_loaded=self.max_loaded,
            max_queue=self.max_queue,
            memory_bytes=self.memory_bytes,
            keep_alive_s=self.keep_alive_s,
            context=self.context,
            load_base_s=0.25 / self.speed if self.load_s is None else self.load_s,
            load_bytes_s=self.load_bytes_s * self.speed if self.load_s is None else float("inf"),
            unload_s=self.unload_s,
            batch_slope=self.batch_slope,
            prompt_cache=self.prompt_cache,
        )

    def model_timing(self, model: SimulatedModel) -> ModelTiming:
        """What the timing machine needs to know of `model`."""
        return ModelTiming(
            weights=model.weights or model.hex_digest,
            size_bytes=model.size_bytes,
            prefill_tokens_s=self.prefill_tokens_s or model.prefill_tokens_s * self.speed,
            decode_tokens_s=self.decode_tokens_s or model.decode_tokens_s * self.speed,
            context_bytes=model.context_bytes,
            trained_context=model.context_length,
            single=not model.can("completion"),
        )


class NodeSpec(msgspec.Struct, frozen=True, kw_only=True):
    """What is needed to start one simulated Ollama."""

    name: str
    models: tuple[SimulatedModel, ...]
    knobs: Knobs


def recorded_models() -> tuple[SimulatedModel, ...]:
    """The models of the recorded conversations: small, with random weights and about one token per letter."""

    def small(name: str, digest: str, modified: str, *capabilities: str, tiny: bool = True, size_bytes: int = 679_809) -> SimulatedModel:
        return SimulatedModel(
            name=f"{name}:latest", digest=digest, size_bytes=size_bytes, family="llama", parameter_size="317K" if tiny else "128K",
            quantization="F16", context_length=8192, embedding_length=64 if tiny else 32, capabilities=capabilities or ("completion",),
            modified_at=modified, decode_tokens_s=2000, prefill_tokens_s=20_000, characters_per_token=1,
        )  # fmt: skip

    def middle(name: str, digest: str, modified: str) -> SimulatedModel:
        return SimulatedModel(
            name=f"{name}:latest", digest=digest, size_bytes=418_741_700, family="llama", parameter_size="209.31M", quantization="F16",
            context_length=8192, embedding_length=1024, modified_at=modified, context_bytes=65_536,
            decode_tokens_s=80, prefill_tokens_s=220, characters_per_token=1,
        )  # fmt: skip

    def scripted(name: str, *capabilities: str, template: str = "{{ .Prompt }}") -> SimulatedModel:
        plain = small(name, "", "2026-11-22T12:20:00Z", "completion", *capabilities, tiny=False, size_bytes=300_344)
        return msgspec.structs.replace(plain, decode_tokens_s=50, template=template, scripted=True, native=name == "native")

    return (
        middle("mid2", "b4c6f370f2d3bbc6bef3c0bf10fc468eb200b7dd051618b5724c0c296d9d95a0", "2026-11-22T12:24:44.628195851Z"),
        middle("mid", "b3f85a5867b40bdcc6d2bc95ee42c6ddd807d9e525271853b953761f24c7767f", "2026-11-22T12:24:40.687789807Z"),
        small("tiny", "c7084452b8c8c83842ff701f6d8e35a07e2a1bd7590222b6772c987d53a17ef2", "2026-11-22T12:24:38.107310401Z"),
        small("tiny2", "54e2d03037b8441ce930056de3e2bdbef5ecd1ae4d917418e2b79009592ff553", "2026-11-22T12:24:38.142482791Z"),
        small("embed", "e3686e30c72d22c5adb73b07e7bd1b92ad6f1e67997011bbe98b40c244ec9791", "2026-11-22T12:24:38.169302132Z", "embedding"),
        msgspec.structs.replace(
            small("nano", "329ff10f5718c12c0313ae022110a998c20bb36b06d8d712ac7468d3bd8a1858", "2026-11-22T12:32:54.897623376Z"),
            size_bytes=71_200,
            parameter_size="31K",
            context_length=2048,
            embedding_length=32,
        ),
        scripted("plain"),
        scripted("coder", "tools"),
        scripted("thinker", "tools", "thinking"),
        scripted("tools", "tools"),
        scripted("musing", "thinking"),
        scripted("native", "tools", "thinking", "vision"),
        scripted("fails"),
        scripted("vision", "vision"),
        scripted(
            "insert", "insert", template="{{ if .Suffix }}<PRE> {{ .Prompt }} <SUF>{{ .Suffix }} <MID>{{ else }}{{ .Prompt }}{{ end }}"
        ),
    )


KNOWN: Final[dict[str, dict[str, Any]]] = {
    "llama3.2:3b": {"size_bytes": 2_019_393_189, "parameter_size": "3.2B", "capabilities": ("completion", "tools")},
    "qwen3:8b": {"size_bytes": 5_225_388_164, "parameter_size": "8.2B", "capabilities": ("completion", "tools", "thinking")},
    "gpt-oss:20b": {"size_bytes": 13_793_441_244, "parameter_size": "20.9B", "capabilities": ("completion", "tools", "thinking")},
    "gemma3:4b": {"size_bytes": 3_338_801_804, "parameter_size": "4.3B", "capabilities": ("completion", "vision")},
    "nomic-embed-text:latest": {
        "size_bytes": 274_302_450, "parameter_size": "137M", "capabilities": ("embedding",), "embedding_length": 768,
        "context_length": 2048,
    },
}  # fmt: skip


HINTS: Final = {"vision": ("vision", "llava", "-vl"), "audio": ("whisper", "audio", "voxtral")}
"""Words in a name that tell what else a model can do."""


def guessed_model(name: str, *, modified_at: str = "2026-11-22T12:00:00Z") -> SimulatedModel:
    """A model called `name`: known facts, else its size from the tag and its kind from words in its name."""
    shown = display_name(name)
    facts = KNOWN.get(shown.lower())
    if facts is None:
        size = SIZE_TAG.search(shown)
        billions = 3.0 if size is None else float(size[1]) / (1 if size[2].lower() == "b" else 1000)
        more = [kind for kind, words in HINTS.items() if any(word in shown.lower() for word in words)]
        capabilities = ("embedding",) if "embed" in shown.lower() else ("completion", "tools", *more)
        facts = {"size_bytes": int(billions * 0.65e9), "parameter_size": f"{billions:g}B", "capabilities": capabilities}
    gigabytes = facts["size_bytes"] / 1e9
    return SimulatedModel(
        name=shown,
        modified_at=modified_at,
        context_bytes=int(16_384 * gigabytes),
        decode_tokens_s=min(400.0, 240.0 / gigabytes),
        prefill_tokens_s=min(20_000.0, 6000.0 / gigabytes),
        **facts,
    )


def demo_nodes() -> tuple[NodeSpec, ...]:
    """Three machines of different speed whose models overlap."""

    def spec(name: str, knobs: Knobs, *models: str) -> NodeSpec:
        made = tuple(guessed_model(model, modified_at=f"2026-11-22T12:0{minute}:00Z") for minute, model in enumerate(models))
        return NodeSpec(name=name, models=made, knobs=knobs)

    return (
        spec("fast", Knobs(speed=2.0, slots=2, seed=1), "llama3.2:3b", "qwen3:8b", "gpt-oss:20b", "nomic-embed-text"),
        spec("medium", Knobs(speed=1.0, memory_bytes=16 * GIB, seed=2), "llama3.2:3b", "qwen3:8b", "nomic-embed-text"),
        spec("slow", Knobs(speed=0.4, memory_bytes=8 * GIB, seed=3), "llama3.2:3b", "gemma3:4b"),
    )
