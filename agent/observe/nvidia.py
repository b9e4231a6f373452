"""NVIDIA GPUs, through the driver's own library (NVML).

Measures, decides nothing. A machine without GPU, driver or library has no devices; a number that a device does not tell is None.
Sync and possibly slow: call it from a worker thread.
"""

import contextlib
from collections.abc import Callable
from typing import Any

import pynvml

from core.messages import GpuDevice
from core.units import MIB


class Nvidia:
    """The GPUs of this machine. Opens the library at birth; never raises."""

    def __init__(self) -> None:
        self._handles: list[Any] = []
        with contextlib.suppress(pynvml.NVMLError):
            pynvml.nvmlInit()
            self._handles = [pynvml.nvmlDeviceGetHandleByIndex(index) for index in range(pynvml.nvmlDeviceGetCount())]

    def devices(self) -> list[GpuDevice]:
        """One entry per kind of device: equal model and memory."""
        kinds: dict[tuple[str, int | None], int] = {}
        for handle in self._handles:
            memory = _ask(pynvml.nvmlDeviceGetMemoryInfo, handle)
            kind = (_name(handle), memory.total if memory else None)
            kinds[kind] = kinds.get(kind, 0) + 1
        return [GpuDevice(model=model, count=count, memory=memory) for (model, memory), count in kinds.items()]

    def load(self) -> dict[str, Any]:
        """The `gpu_*` fields of a heartbeat over all devices: mean usage, memory summed, the highest temperature. {} without GPU."""
        if not self._handles:
            return {}
        usage = [rates.gpu for rates in _told(pynvml.nvmlDeviceGetUtilizationRates, self._handles)]
        memory = _told(pynvml.nvmlDeviceGetMemoryInfo, self._handles)
        heat = _told(lambda handle: pynvml.nvmlDeviceGetTemperature(handle, pynvml.NVML_TEMPERATURE_GPU), self._handles)
        capability = _ask(pynvml.nvmlDeviceGetCudaComputeCapability, self._handles[0])
        total, used = sum(each.total for each in memory), sum(each.used for each in memory)
        return {
            "gpu_usage": round(sum(usage) / len(usage), 1) if usage else None,
            "gpu_memory_usage": round(100 * used / total, 1) if total else None,
            "gpu_memory_total_mb": float(total // MIB) if memory else None,
            "gpu_memory_used_mb": float(used // MIB) if memory else None,
            "gpu_temperature": float(max(heat)) if heat else None,
            "gpu_model_name": _name(self._handles[0]),
            "gpu_compute_capability": f"{capability[0]}.{capability[1]}" if capability else None,
        }


def _told(question: Callable[[Any], Any], handles: list[Any]) -> list[Any]:
    """What those devices answer that can."""
    return [answer for handle in handles if (answer := _ask(question, handle)) is not None]


def _ask(question: Callable[[Any], Any], handle: Any) -> Any:
    try:
        return question(handle)
    except pynvml.NVMLError:
        return None


def _name(handle: Any) -> str:
    name = _ask(pynvml.nvmlDeviceGetName, handle)
    return (name.decode("utf-8", "replace") if isinstance(name, bytes) else name) or "NVIDIA GPU"
