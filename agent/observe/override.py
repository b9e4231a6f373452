"""What the operator says about the GPUs, over what was found.

Decides which of the two a registration tells; measures nothing.
"""

from agent.config import GpuOverride
from core.messages import GpuDevice


def apply_override(found: list[GpuDevice], override: GpuOverride) -> list[GpuDevice]:
    """The devices to register; none when the operator says that there is no GPU.

    A model, count or memory that is given describes one kind of device, completed from the first one found.
    """
    if override.available is False or override.count == 0:
        return []
    if override.model is None and override.count is None and override.memory_bytes is None:
        if override.available and not found:
            return [GpuDevice(model="GPU")]
        return found
    like = found[0] if found else GpuDevice(model="GPU")
    return [
        GpuDevice(
            model=override.model or like.model,
            count=override.count or like.count,
            memory=override.memory_bytes if override.memory_bytes is not None else like.memory,
        )
    ]
