"""Machines and models of the simulated world: how fast a GPU runs a model, and how long it takes to load.

Decides nothing. Speeds of an 8B model at Q4_K_M are single-stream llama.cpp measurements (XiongjieDai/GPU-Benchmarks-on-LLM-Inference
at aa72e0ec, May 2024; the RTX 3060 is scaled by bandwidth and compute, unsourced); other sizes scale from them by the fits below.
"""

from collections.abc import Mapping
from typing import Final

import msgspec

from core.simulation.node import ModelTiming, NodeTiming
from core.units import GIB


class Gpu(msgspec.Struct, frozen=True, kw_only=True):
    """An accelerator with an 8B model at Q4_K_M. `memory_gb`: what models may use. `load_gb_s`: from disk into it."""

    memory_gb: float
    decode_tok_s: float
    prefill_tok_s: float
    load_gb_s: float
    batch_slope: float
    """Each further stream of a runner slows all of them by this share (routing.md 3)."""


class Weights(msgspec.Struct, frozen=True, kw_only=True):
    """A model at Q4_K_M. `decode` and `prefill`: its speed as a multiple of the 8B's. `context_kb`: KV cache per token."""

    size_gb: float
    decode: float
    prefill: float
    context_kb: int


GPUS: Final[Mapping[str, Gpu]] = {
    "rtx-3060": Gpu(memory_gb=12, decode_tok_s=50.0, prefill_tok_s=1500.0, load_gb_s=1.5, batch_slope=0.2),
    "rtx-3070": Gpu(memory_gb=8, decode_tok_s=70.9, prefill_tok_s=2284.0, load_gb_s=1.5, batch_slope=0.2),
    "rtx-3090": Gpu(memory_gb=24, decode_tok_s=111.7, prefill_tok_s=3865.0, load_gb_s=2.0, batch_slope=0.15),
    "rtx-4090": Gpu(memory_gb=24, decode_tok_s=127.7, prefill_tok_s=6899.0, load_gb_s=2.0, batch_slope=0.12),
    "a100-80": Gpu(memory_gb=80, decode_tok_s=138.3, prefill_tok_s=5800.0, load_gb_s=2.0, batch_slope=0.10),
    "m1-max": Gpu(memory_gb=44, decode_tok_s=34.5, prefill_tok_s=355.0, load_gb_s=3.0, batch_slope=0.30),
    "m2-ultra": Gpu(memory_gb=144, decode_tok_s=76.3, prefill_tok_s=1024.0, load_gb_s=3.0, batch_slope=0.25),
    "m3-max": Gpu(memory_gb=44, decode_tok_s=50.7, prefill_tok_s=678.0, load_gb_s=3.0, batch_slope=0.28),
}

MODELS: Final[Mapping[str, Weights]] = {
    "llama3.2:3b": Weights(size_gb=2.0, decode=1.9, prefill=2.4, context_kb=112),
    "qwen2.5-coder:7b": Weights(size_gb=4.7, decode=1.04, prefill=1.1, context_kb=56),
    "llama3.1:8b": Weights(size_gb=4.9, decode=1.0, prefill=1.0, context_kb=128),
    "gemma2:9b": Weights(size_gb=5.8, decode=0.85, prefill=0.87, context_kb=168),
    "gemma3:12b": Weights(size_gb=8.1, decode=0.61, prefill=0.66, context_kb=160),
    "qwen2.5:14b": Weights(size_gb=9.0, decode=0.55, prefill=0.56, context_kb=192),
    "qwen2.5:32b": Weights(size_gb=20.0, decode=0.26, prefill=0.25, context_kb=256),
    "llama3.1:70b": Weights(size_gb=42.5, decode=0.16, prefill=0.122, context_kb=320),
}

LOAD_BASE_S: Final = 1.0
"""Starting a runner, whatever its size (routing.md 3: 1 s + size / bandwidth)."""
UNLOAD_S: Final = 1.0


def node_timing(gpu: Gpu, *, slots: int = 4, max_loaded: int = 3, load_speed: float = 1.0, batch_slope: float | None = None) -> NodeTiming:
    """An Ollama on this GPU. `load_speed` multiplies how fast it loads."""
    return NodeTiming(
        slots=slots,
        max_loaded=max_loaded,
        memory_bytes=round(gpu.memory_gb * GIB),
        load_base_s=LOAD_BASE_S,
        load_bytes_s=gpu.load_gb_s * load_speed * 1e9,
        unload_s=UNLOAD_S,
        batch_slope=gpu.batch_slope if batch_slope is None else batch_slope,
    )


def model_timing(name: str, model: Weights, gpu: Gpu) -> ModelTiming:
    """`model` on `gpu`."""
    return ModelTiming(
        weights=name,
        size_bytes=round(model.size_gb * 1e9),
        prefill_tokens_s=gpu.prefill_tok_s * model.prefill,
        decode_tokens_s=gpu.decode_tok_s * model.decode,
        context_bytes=model.context_kb * 1024,
    )


def fits(model: Weights, gpu: Gpu, *, context: int = 4096, slots: int = 4) -> bool:
    """Whether the model, with its context, fits into the GPU as a whole."""
    return model.size_gb * 1e9 + model.context_kb * 1024 * context * slots <= gpu.memory_gb * GIB


MIXED: Final = ("rtx-4090", "rtx-3090", "rtx-3090", "rtx-3060", "rtx-3060", "m1-max", "m2-ultra", "a100-80")
"""The eight nodes of routing.md 6."""
