"""Fleet files: machines and models in TOML, for studies.

Decides what a file may say. Machines are named GPUs or explicit speeds; models are those of `core.simulation.hardware` and one's own.
Invariants: a file that cannot be used is one sentence that names the entry; at most `NODES_MAX` machines.
"""

import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import msgspec

from core.simulation.hardware import GPUS, MIXED, MODELS, Gpu, Weights, fits, model_timing, node_timing
from core.simulation.study import NodeSpec
from servers.study.traces import Trace

NODES_MAX: Final = 256


class FleetError(ValueError):
    """The file cannot be used; says why, in one sentence."""


class _Node(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    gpu: str | None = None
    name: str | None = None
    count: int = 1
    slots: int = 4
    max_loaded: int = 3
    models: list[str] | None = None
    memory_gb: float | None = None
    decode_tok_s: float | None = None
    prefill_tok_s: float | None = None
    load_gb_s: float | None = None
    batch_slope: float | None = None


class _Model(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    name: str
    size_gb: float
    decode: float | None = None
    prefill: float | None = None
    context_kb: int = 128


class _File(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    node: list[_Node]
    model: list[_Model] = []
    mix: dict[str, dict[str, int]] = {}


class Fleet(msgspec.Struct, frozen=True, kw_only=True):
    """Machines, and which models each kind of request asks for (empty: what the trace says)."""

    nodes: tuple[NodeSpec, ...]
    mixes: Mapping[str, Mapping[str, int]] = {}


def mixed(*, slots: int = 4) -> Fleet:
    """The eight nodes and eight models of routing.md 6."""
    file = _File(node=[_Node(gpu=gpu, slots=slots) for gpu in MIXED])
    return _fleet(file)


def homogeneous() -> Fleet:
    """Eight equal nodes and three models that all fit everywhere: the control of routing.md 6.3."""
    models = ["llama3.2:3b", "llama3.1:8b", "qwen2.5-coder:7b"]
    file = _File(
        node=[_Node(gpu="rtx-3090", count=8, models=models)],
        mix={"conversation": {"llama3.1:8b": 60, "llama3.2:3b": 40}, "code": {"qwen2.5-coder:7b": 100}},
    )
    return _fleet(file)


def read(path: Path) -> Fleet:
    """The fleet in a file.

    Raises:
        FleetError: it cannot be read or used.
    """
    try:
        file = msgspec.convert(tomllib.loads(path.read_text("utf-8")), _File)
    except (OSError, UnicodeDecodeError) as error:
        raise FleetError(f"{path} cannot be read: {error}") from None
    except tomllib.TOMLDecodeError as error:
        raise FleetError(f"{path} is not TOML: {error}") from None
    except msgspec.ValidationError as error:
        raise FleetError(f"{path} is not a fleet file: {error}") from None
    return _fleet(file)


def _fleet(file: _File) -> Fleet:
    models = dict(MODELS)
    for own in file.model:
        if own.size_gb <= 0 or own.context_kb < 0 or min(own.decode or 1, own.prefill or 1) <= 0:
            raise FleetError(f"the model {own.name}: sizes and speeds must be above 0")
        scale = MODELS["llama3.1:8b"].size_gb / own.size_gb
        models[own.name] = Weights(size_gb=own.size_gb, decode=own.decode or scale, prefill=own.prefill or scale, context_kb=own.context_kb)
    nodes: list[NodeSpec] = []
    for node in file.node:
        nodes += _machines(node, models, len(nodes))
        if len(nodes) > NODES_MAX:
            raise FleetError(f"a study has {NODES_MAX} machines at most")
    if not nodes:
        raise FleetError("a fleet needs at least one [[node]]")
    for kind, mix in file.mix.items():
        if not mix or min(mix.values()) < 0 or not sum(mix.values()):
            raise FleetError(f"the mix of {kind} needs weights of which one is above 0")
    return Fleet(nodes=tuple(nodes), mixes=file.mix)


def _machines(node: _Node, models: Mapping[str, Weights], before: int) -> list[NodeSpec]:
    title = node.name or node.gpu or f"node-{before}"
    gpu = _gpu(node, title)
    if not (1 <= node.count <= NODES_MAX and 1 <= node.slots <= 64 and 1 <= node.max_loaded <= 64):
        raise FleetError(f"{title}: count must be 1 to {NODES_MAX}, slots and max_loaded 1 to 64")
    chosen = models if node.models is None else {name: models.get(name) for name in node.models}
    held: dict[str, Weights] = {}
    for name, model in chosen.items():
        if model is None:
            raise FleetError(f"{title}: the speed of the model {name} is not known: describe it in a [[model]] of its own")
        if fits(model, gpu, slots=node.slots):
            held[name] = model
        elif node.models is not None:
            raise FleetError(f"{title}: {name} does not fit into {gpu.memory_gb:g} GB with its context for {node.slots} slots")
    timing = node_timing(gpu, slots=node.slots, max_loaded=node.max_loaded)
    timings = {name: model_timing(name, model, gpu) for name, model in held.items()}
    single = node.count == 1 and node.name is not None
    return [NodeSpec(name=title if single else f"{title}-{before + index}", timing=timing, models=timings) for index in range(node.count)]


def _gpu(node: _Node, title: str) -> Gpu:
    """The named GPU, with what the file says about it instead."""
    told: dict[str, Any] = {
        name: value
        for name in ("memory_gb", "decode_tok_s", "prefill_tok_s", "load_gb_s", "batch_slope")
        if (value := getattr(node, name)) is not None
    }
    if any(value <= 0 for name, value in told.items() if name != "batch_slope"):
        raise FleetError(f"{title}: memory and speeds must be above 0")
    if node.gpu is None:
        try:
            return Gpu(**{"load_gb_s": 1.5, "batch_slope": 0.2, **told})
        except TypeError:
            raise FleetError(
                f"{title} needs a gpu ({', '.join(GPUS)}), or memory_gb, decode_tok_s and prefill_tok_s (of an 8B model at Q4)"
            ) from None
    if node.gpu not in GPUS:
        raise FleetError(f"{title}: the gpu {node.gpu!r} is not known: use one of {', '.join(GPUS)}, or give its speeds yourself")
    return msgspec.structs.replace(GPUS[node.gpu], **told)


def usable_mixes(fleet: Fleet, trace: Trace, mixes: Mapping[str, Mapping[str, int]]) -> dict[str, dict[str, int]]:
    """The mix of each kind of request, models that no machine holds left out.

    Raises:
        FleetError: nothing is left of a kind.
    """
    held = {name for node in fleet.nodes for name in node.models}
    out = {}
    for kind, mix in mixes.items():
        chosen = fleet.mixes.get(kind, mix)
        left = {name: weight for name, weight in chosen.items() if name in held and weight > 0}
        if not left:
            raise FleetError(f"no machine holds what {kind!r} requests of {trace.title()} ask for ({', '.join(chosen)})")
        out[kind] = left
    return out
