"""What the operator chose for one agent: environment over saved settings over defaults, each value parsed and checked once, at the start.

Decides what a setting takes, and what an agent remembers about itself between runs. Knows no socket and no machine. Invariants: an
`AgentConfig` that exists is usable; every wrong value is a `ConfigError` of one line that names the setting and what it takes, and
never shows a secret; `instance_id` outlives restarts and `boot` grows with each.
"""

import json
import math
import os
import tempfile
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

from core.errors import ConfigError
from core.units import GIB

OLLAMA_PORT: Final = 11434
DEFAULT_ROUTER_URL: Final = "http://localhost:8080"
FILE_MAX_BYTES: Final = 1 << 20
"""A settings or identity file larger than this is something else."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuOverride:
    """What the operator says about the GPUs; None: as detected."""

    available: bool | None = None
    model: str | None = None
    count: int | None = None
    memory_bytes: int | None = None
    """Of one device."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AgentConfig:
    """Every setting of an agent; times in seconds."""

    router_url: str = DEFAULT_ROUTER_URL
    """Without a slash at its end."""
    ollama_port: int = OLLAMA_PORT
    """What is registered as the port of this node's Ollama."""
    ollama_url: str = f"http://127.0.0.1:{OLLAMA_PORT}"
    """Where the agent itself reaches its Ollama."""
    api_port: int = OLLAMA_PORT + 1
    """The gateway's port; 0: any free one."""
    advertise_address: str | None = None
    heartbeat_interval_s: float = 10.0
    join_token: str | None = None
    gpu: GpuOverride = field(default_factory=GpuOverride)
    slots: int | None = None
    data_dir: Path = field(default_factory=lambda: Path.home() / ".ollama-agent")
    stop_timeout_s: float = 30.0
    log_level: str = "info"
    log_format: str | None = None
    """`console` or `json`; None: by what standard output is."""
    warnings: tuple[str, ...] = ()
    """What the operator should know about these settings."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Identity:
    """Who this agent is. `boot` is larger than in any run before."""

    instance_id: str
    boot: int


# ---------------------------------------------------------------- values


def _text(value: str) -> str:
    return value


def _token(value: str) -> str:
    if not (value.isascii() and value.isprintable()) or " " in value:
        raise ValueError
    return value


def _integer(value: str) -> int:
    if not (value.isascii() and value.isdigit()) or len(value) > 9:
        raise ValueError
    return int(value)


def _between(low: float, high: float) -> Callable[[str], float]:
    def parse(value: str) -> float:
        number = float(value)
        if not (math.isfinite(number) and low <= number <= high):
            raise ValueError
        return number

    return parse


def _integer_between(low: int, high: int) -> Callable[[str], int]:
    def parse(value: str) -> int:
        if not low <= (number := _integer(value)) <= high:
            raise ValueError
        return number

    return parse


def _flag(value: str) -> bool:
    word = value.lower()
    if word not in _FLAGS:
        raise ValueError
    return _FLAGS[word]


_FLAGS: Final = {"true": True, "1": True, "yes": True, "on": True, "false": False, "0": False, "no": False, "off": False}


def _word(*allowed: str) -> Callable[[str], str]:
    def parse(value: str) -> str:
        if value.lower() not in allowed:
            raise ValueError
        return value.lower()

    return parse


def _url(value: str) -> str:
    """`http://host[:port][/path]`, or without the scheme, as Ollama takes it; without a slash at the end."""
    text = value if "://" in value else f"http://{value}"
    parts = urlsplit(text)
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment or parts.username is not None:
        raise ValueError
    if parts.port == 0 or any(letter.isspace() for letter in text):
        raise ValueError
    return text.rstrip("/")


def _plain_url(value: str) -> str:
    """Such a URL without TLS: the gateway speaks plain HTTP to the Ollama beside it."""
    if not (url := _url(value)).startswith("http://"):
        raise ValueError
    return url


def _path(value: str) -> Path:
    return Path(value).expanduser()


@dataclass(frozen=True, slots=True)
class _Setting:
    """One row of the table: how the text is read, and what a text that cannot be read should have been."""

    parse: Callable[[str], Any]
    takes: str
    old_name: str | None = None
    secret: bool = False


_HTTP_URL: Final = "a URL such as http://192.168.1.5:8080"

TABLE: Final[Mapping[str, _Setting]] = {
    "ROUTER_URL": _Setting(_url, _HTTP_URL, "COORDINATOR_URL"),
    "OLLAMA_PORT": _Setting(_integer_between(1, 65535), "a port from 1 to 65535"),
    "OLLAMA_API_BASE": _Setting(_plain_url, f"a URL such as http://127.0.0.1:{OLLAMA_PORT}"),
    "AGENT_API_PORT": _Setting(_integer_between(0, 65535), "a port from 0 (any free one) to 65535"),
    "AGENT_ADVERTISE_ADDRESS": _Setting(_token, "an address under which the coordinator reaches this machine"),
    "AGENT_HEARTBEAT_INTERVAL_SECS": _Setting(_between(1, 300), "a number of seconds from 1 to 300"),
    "AGENT_STOP_TIMEOUT_SECS": _Setting(_between(0, 3600), "a number of seconds from 0 to 3600"),
    "AGENT_DATA_DIR": _Setting(_path, "a directory"),
    "ROUTER_JOIN_TOKEN": _Setting(_token, "the token that the coordinator printed, one word", secret=True),
    "OLLAMA_GPU_AVAILABLE": _Setting(_flag, "true or false"),
    "OLLAMA_GPU_MODEL": _Setting(_text, "the GPU's name"),
    "OLLAMA_GPU_COUNT": _Setting(_integer_between(0, 1024), "a whole number from 0 to 1024"),
    "OLLAMA_GPU_MEMORY_GB": _Setting(_between(0.1, 4096), "the memory of one GPU in GiB, from 0.1 to 4096"),
    "OLLAMA_NUM_PARALLEL": _Setting(_integer_between(0, 1024), "a whole number from 0 (Ollama's own choice) to 1024"),
    "ROUTER_LOG_LEVEL": _Setting(_word("debug", "info", "warning", "error"), "debug, info, warning or error"),
    "ROUTER_LOG_FORMAT": _Setting(_word("console", "json"), "console or json"),
}  # fmt: skip

SAVED: Final = ("ROUTER_URL", "OLLAMA_PORT", "AGENT_HEARTBEAT_INTERVAL_SECS")
"""What may come from the saved settings."""


def load(environ: Mapping[str, str], *, home: Path | None = None) -> AgentConfig:
    """The configuration, from the environment and the saved settings in the data directory.

    Raises:
        ConfigError: a value that cannot be used; the text is one line for the operator.
    """
    warnings: list[str] = []
    given = {name: value for name in TABLE if (value := _from_environment(environ, name, warnings)) is not None}
    data_dir = given.get("AGENT_DATA_DIR") or (home or Path.home()) / ".ollama-agent"
    for name, value in _saved(data_dir / "settings.json").items():
        given.setdefault(name, value)
    ollama_url = given.get("OLLAMA_API_BASE") or f"http://127.0.0.1:{given.get('OLLAMA_PORT', OLLAMA_PORT)}"
    ollama_port = given.get("OLLAMA_PORT") or port_of(ollama_url)
    memory_gb = given.get("OLLAMA_GPU_MEMORY_GB")
    return AgentConfig(
        router_url=given.get("ROUTER_URL", DEFAULT_ROUTER_URL),
        ollama_port=ollama_port,
        ollama_url=ollama_url,
        api_port=given.get("AGENT_API_PORT", ollama_port % 65535 + 1),
        advertise_address=given.get("AGENT_ADVERTISE_ADDRESS"),
        heartbeat_interval_s=given.get("AGENT_HEARTBEAT_INTERVAL_SECS", 10.0),
        join_token=given.get("ROUTER_JOIN_TOKEN"),
        gpu=GpuOverride(
            available=given.get("OLLAMA_GPU_AVAILABLE"),
            model=given.get("OLLAMA_GPU_MODEL"),
            count=given.get("OLLAMA_GPU_COUNT"),
            memory_bytes=None if memory_gb is None else round(memory_gb * GIB),
        ),
        slots=given.get("OLLAMA_NUM_PARALLEL") or None,
        data_dir=data_dir,
        stop_timeout_s=given.get("AGENT_STOP_TIMEOUT_SECS", 30.0),
        log_level=given.get("ROUTER_LOG_LEVEL", "info"),
        log_format=given.get("ROUTER_LOG_FORMAT"),
        warnings=tuple(warnings),
    )


def _from_environment(environ: Mapping[str, str], name: str, warnings: list[str]) -> Any:
    """The parsed value of one variable, under its old name if need be; None when it is not set or blank."""
    setting = TABLE[name]
    for called in (name, setting.old_name):
        text = environ.get(called, "").strip() if called else ""
        if text and called:
            if called != name:
                warnings.append(f"{called} is the old name of {name}: please use {name}")
            return _parsed(called, setting, text)
    return None


def _parsed(called: str, setting: _Setting, text: str) -> Any:
    try:
        return setting.parse(text)
    except ValueError:
        shown = "" if setting.secret else f", not {text[:100]!r}"
        raise ConfigError(f"{called} takes {setting.takes}{shown}") from None


def _saved(path: Path) -> dict[str, Any]:
    """The settings that the agent's own page saved; none when there is no such file."""
    saved = _read_json(path)
    return {name: _parsed(f"{name} in {path}", TABLE[name], str(saved[name])) for name in SAVED if saved.get(name) is not None}


def port_of(url: str) -> int:
    """The port of a checked URL."""
    parts = urlsplit(url)
    return parts.port or (443 if parts.scheme == "https" else 80)


# ---------------------------------------------------------------- identity


def take_identity(config: AgentConfig, *, unix_ms: int) -> Identity:
    """Who this agent is, and a `boot` number for this run; both are on disk (0600) when this returns.

    One file per Ollama, so that several agents on one machine are several agents.

    Raises:
        ConfigError: the data directory cannot be used.
    """
    parts = urlsplit(config.ollama_url)
    path = config.data_dir / f"identity-{_file_name(parts.hostname or '')}-{port_of(config.ollama_url)}.json"
    saved = _read_json(path)
    instance_id, boot = saved.get("instance_id"), saved.get("boot")
    identity = Identity(
        instance_id=instance_id if isinstance(instance_id, str) and _is_uuid(instance_id) else str(uuid.uuid4()),
        boot=max(boot + 1 if isinstance(boot, int) else 0, unix_ms),
    )
    _write_json(path, {"instance_id": identity.instance_id, "boot": identity.boot})
    return identity


def _file_name(host: str) -> str:
    return "".join(letter if (letter.isalnum() and letter.isascii()) or letter in ".-" else "_" for letter in host)


def _is_uuid(text: str) -> bool:
    try:
        uuid.UUID(text)
    except ValueError:
        return False
    return True


def _read_json(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            value = json.loads(file.read(FILE_MAX_BYTES))
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}; AGENT_DATA_DIR names another directory") from None
    except (ValueError, RecursionError):
        raise ConfigError(f"{path} is not valid JSON; correct it or remove it") from None
    if not isinstance(value, dict):
        raise ConfigError(f"{path} must hold a JSON object; correct it or remove it")
    return value


def _write_json(path: Path, value: dict[str, Any]) -> None:
    """All or nothing, readable for its owner only."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=".tmp-")  # mkstemp makes it 0600
        try:
            with os.fdopen(handle, "w") as file:
                json.dump(value, file)
                file.flush()
                os.fsync(file.fileno())
            Path(temporary).replace(path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise
    except OSError as error:
        raise ConfigError(f"{path.parent} cannot be written: {error.strerror}; AGENT_DATA_DIR names another directory") from None


__all__ = ["SAVED", "TABLE", "AgentConfig", "GpuOverride", "Identity", "load", "port_of", "take_identity"]
