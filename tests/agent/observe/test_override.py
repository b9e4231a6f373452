"""What the operator says about GPUs, over what was found."""

import pytest

from agent.config import GpuOverride
from agent.observe.override import apply_override
from core.messages import GpuDevice

FOUND = [GpuDevice(model="RTX 4090", count=2, memory=24), GpuDevice(model="RTX 3060", memory=12)]


@pytest.mark.parametrize(
    ("found", "override", "expected"),
    [
        (FOUND, {}, FOUND),
        ([], {}, []),
        (FOUND, {"available": True}, FOUND),
        (FOUND, {"available": False, "model": "x"}, []),
        (FOUND, {"count": 0}, []),
        ([], {"available": True}, [GpuDevice(model="GPU")]),
        ([], {"model": "MI300", "count": 8, "memory_bytes": 99}, [GpuDevice(model="MI300", count=8, memory=99)]),
        ([], {"count": 3}, [GpuDevice(model="GPU", count=3)]),
        (FOUND, {"memory_bytes": 48}, [GpuDevice(model="RTX 4090", count=2, memory=48)]),
        (FOUND, {"model": "mine"}, [GpuDevice(model="mine", count=2, memory=24)]),
    ],
)
def test_override(found: list[GpuDevice], override: dict[str, object], expected: list[GpuDevice]) -> None:
    assert apply_override(found, GpuOverride(**override)) == expected  # type: ignore[arg-type]
