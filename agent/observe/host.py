"""How busy this machine is, and what it is called.

Measures, decides nothing. Sync and possibly slow: call it from a worker thread.
"""

import os
import socket
from pathlib import Path
from typing import Final

import psutil

MODEL_DIRECTORIES: Final = ("~/.ollama/models", "/usr/share/ollama/.ollama/models")
"""Where Ollama keeps models when `OLLAMA_MODELS` does not say: of a user's own, and of the service that its script installs."""


def cpu_and_memory() -> tuple[float, float]:
    """Percentages, 0-100: processor time since the last call (0 at the first), memory in use now."""
    return _percent(psutil.cpu_percent(interval=None)), _percent(psutil.virtual_memory().percent)


def machine_name() -> str:
    """What this machine calls itself."""
    return socket.gethostname() or "unnamed"


def free_for_models() -> int | None:
    """Free bytes of the disk that holds the models; None when it is not known which that is."""
    chosen = os.environ.get("OLLAMA_MODELS")
    for place in [chosen] if chosen else MODEL_DIRECTORIES:
        path = Path(place).expanduser()
        try:
            if path.is_dir():
                return int(psutil.disk_usage(str(path)).free)
        except OSError:  # another user's directory
            continue
    return None


def source_address(host: str, port: int) -> str | None:
    """The address of this machine that `host` would see; None when there is no way there. Sends nothing.

    Resolves `host`, so it may take seconds.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.connect(address)
            return str(probe.getsockname()[0])
    except OSError:
        return None


def _percent(value: float) -> float:
    return min(100.0, max(0.0, round(value, 1)))
