"""NVIDIA GPUs through a stand-in for the driver's library: none, some, and devices that do not tell everything."""

from types import SimpleNamespace
from typing import Any

import pynvml
import pytest

from agent.observe.nvidia import Nvidia

MIB = 1 << 20


class Driver:
    """What `pynvml` asks; each device is a dict of answers, a missing one is an error."""

    def __init__(self, *devices: dict[str, Any]) -> None:
        self.devices = devices

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def asks(key: str) -> Any:
            def ask(handle: dict[str, Any], *_: object) -> Any:
                if key not in handle:
                    raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)
                return handle[key]

            return ask

        monkeypatch.setattr(pynvml, "nvmlInit", lambda: None)
        monkeypatch.setattr(pynvml, "nvmlDeviceGetCount", lambda: len(self.devices))
        monkeypatch.setattr(pynvml, "nvmlDeviceGetHandleByIndex", lambda index: self.devices[index])
        monkeypatch.setattr(pynvml, "nvmlDeviceGetName", asks("name"))
        monkeypatch.setattr(pynvml, "nvmlDeviceGetMemoryInfo", asks("memory"))
        monkeypatch.setattr(pynvml, "nvmlDeviceGetUtilizationRates", asks("rates"))
        monkeypatch.setattr(pynvml, "nvmlDeviceGetTemperature", asks("heat"))
        monkeypatch.setattr(pynvml, "nvmlDeviceGetCudaComputeCapability", asks("capability"))


def device(name: str | bytes, total_mb: int, used_mb: int, usage: int, heat: int) -> dict[str, Any]:
    return {
        "name": name,
        "memory": SimpleNamespace(total=total_mb * MIB, used=used_mb * MIB),
        "rates": SimpleNamespace(gpu=usage),
        "heat": heat,
        "capability": (8, 9),
    }


def test_without_library_or_driver_there_is_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> None:
        raise pynvml.NVMLError(pynvml.NVML_ERROR_LIBRARY_NOT_FOUND)

    monkeypatch.setattr(pynvml, "nvmlInit", missing)
    nvidia = Nvidia()
    assert (nvidia.devices(), nvidia.load()) == ([], {})


def test_devices_of_one_kind_are_one_entry(monkeypatch: pytest.MonkeyPatch) -> None:
    Driver(device("RTX 4090", 24_000, 6_000, 50, 60), device(b"RTX 4090", 24_000, 0, 0, 40), device("RTX 3060", 12_000, 0, 10, 50)).install(
        monkeypatch
    )
    nvidia = Nvidia()
    found = nvidia.devices()
    assert [(each.model, each.count, each.memory) for each in found] == [("RTX 4090", 2, 24_000 * MIB), ("RTX 3060", 1, 12_000 * MIB)]
    assert nvidia.load() == {
        "gpu_usage": 20.0,
        "gpu_memory_usage": 10.0,
        "gpu_memory_total_mb": 60_000.0,
        "gpu_memory_used_mb": 6_000.0,
        "gpu_temperature": 60.0,
        "gpu_model_name": "RTX 4090",
        "gpu_compute_capability": "8.9",
    }


def test_what_a_device_does_not_tell_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    Driver({}).install(monkeypatch)
    nvidia = Nvidia()
    assert [(each.model, each.memory) for each in nvidia.devices()] == [("NVIDIA GPU", None)]
    load = nvidia.load()
    assert load.pop("gpu_model_name") == "NVIDIA GPU"
    assert set(load.values()) == {None}
