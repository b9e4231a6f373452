"""What the operator chose: environment over TOML file over defaults, each value parsed and checked once, at the start.

Decides what a setting takes. Knows no socket and no router. Invariants: a `Settings` that exists is usable; every wrong value is a
`ConfigError` of one line that names the setting and what it takes, and never shows a secret.
"""

import ipaddress
import math
import os
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

from core.config import STRATEGIES, RouterConfig
from core.errors import ConfigError
from core.events import Upstream
from core.history import parse_mask
from core.units import GIB, MIB

Network = ipaddress.IPv4Network | ipaddress.IPv6Network

OLLAMA_PORT: Final = 11434
LOOPBACK: Final[tuple[Network, ...]] = (ipaddress.ip_network("127.0.0.0/8"), ipaddress.ip_network("::1/128"))
SLOTS_MAX: Final = 1024
SOCKET_PATH_MAX_BYTES: Final = 100
TOML_MAX_BYTES: Final = MIB
"""A settings file larger than this is something else."""


@dataclass(frozen=True, slots=True)
class Backend:
    """One entry of `OLLAMA_BACKENDS`: a node without an agent."""

    name: str
    upstream: Upstream
    slots: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """Every setting of the coordinator; times in seconds, sizes in bytes. `servers.settings.TABLE` says what each one is."""

    host: str = "0.0.0.0"
    port: int = 8080
    ollama_port: int | None = None
    database_url: str = "sqlite://coordinator.db"
    data_dir: Path = field(default_factory=lambda: Path.home() / ".ollama-router")
    health_check_interval_s: float = 30.0
    agent_timeout_s: float = 60.0
    load_balancer_mode: str = "auto"
    backends: tuple[Backend, ...] = ()
    aliases: tuple[tuple[str, tuple[str, ...]], ...] = ()
    resume: str = "off"
    raise_context: bool = False
    cloud: bool = False
    preload: bool = False
    nginx_direct: bool = False
    selection: Path | None = None
    """Its socket; None: `selection.sock` in the data directory, `NO_SELECTION`: there is none."""
    tally: tuple[str, int] = ("127.0.0.1", 0)
    history_json: bool = False
    require_gpu: bool = True
    auth: str = "auto"
    admin_token: str | None = None
    join_token: str | None = None
    require_api_key: bool = False
    queue_max: int = 1024
    queue_per_client: int = 64
    queue_timeout_s: float = 300.0
    body_max_bytes: int = 256 * MIB
    body_memory_bytes: int = 512 * MIB
    first_token_timeout_s: float | None = None
    stall_timeout_s: float | None = None
    origins: tuple[str, ...] = ()
    base_path: str = ""
    auto_distribute: bool = True
    history_retention_days: int = 7
    history_max_bytes: int | None = None
    history_body_max_bytes: int = MIB
    history_bodies: str | None = None
    history_mask: tuple[tuple[str, ...], ...] = ()
    tls_cert: Path | None = None
    tls_key: Path | None = None
    trusted_proxies: tuple[Network, ...] = LOOPBACK
    log_level: str = "info"
    log_format: str | None = None
    stop_timeout_s: float = 30.0
    warnings: tuple[str, ...] = ()
    """What the operator should know about these settings: old names, settings that do nothing yet."""

    def router_config(self) -> RouterConfig:
        """What of it the core's decisions depend on.

        Raises:
            ConfigError: the values do not go together.
        """
        return RouterConfig(
            strategy=self.load_balancer_mode,
            agent_timeout_s=self.agent_timeout_s,
            queue_max=self.queue_max,
            queue_per_client=self.queue_per_client,
            queue_timeout_s=self.queue_timeout_s,
            raise_context=self.raise_context,
        )


# ---------------------------------------------------------------- values


def _text(value: str) -> str:
    if not value:
        raise ValueError
    return value


def _token(value: str) -> str:
    if len(value) < 8 or not value.isascii() or not value.isprintable() or " " in value:
        raise ValueError
    return value


def _port(value: str) -> int:
    if not 0 <= (port := _integer(value)) <= 65535:
        raise ValueError
    return port


def _integer(value: str) -> int:
    if not (value.isascii() and value.isdigit()):
        raise ValueError
    return int(value)


def _positive(value: str) -> int:
    if (number := _integer(value)) < 1:
        raise ValueError
    return number


def _masks(value: str) -> tuple[tuple[str, ...], ...]:
    try:
        return tuple(parse_mask(path) for path in value.split(",") if path.strip())
    except ConfigError:
        raise ValueError from None


_TIME_UNITS: Final = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_SIZE_UNITS: Final = {"kib": 1 << 10, "mib": MIB, "gib": GIB, "kb": 1000, "mb": 1000**2, "gb": 1000**3, "b": 1}


def _seconds(value: str) -> float:
    number, unit = _split_unit(value, "s")
    seconds = number * _TIME_UNITS[unit]
    if not (math.isfinite(seconds) and 0 < seconds <= 366 * 86400):
        raise ValueError
    return seconds


def _bytes(value: str) -> int:
    number, unit = _split_unit(value, "b")
    size = number * _SIZE_UNITS[unit]
    if not (math.isfinite(size) and 1 <= size <= 1 << 60):
        raise ValueError
    return int(size)


def _split_unit(value: str, default: str) -> tuple[float, str]:
    number = value.strip().rstrip("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ")
    return float(number), value.strip()[len(number) :].lower() or default


def _bool(value: str) -> bool:
    match value.lower():
        case "true" | "1" | "yes" | "on":
            return True
        case "false" | "0" | "no" | "off":
            return False
        case _:
            raise ValueError


def _one_of(*choices: str) -> Callable[[str], str]:
    def parse(value: str) -> str:
        if value.lower() not in choices:
            raise ValueError
        return value.lower()

    return parse


def _path(value: str) -> Path:
    return Path(_text(value)).expanduser()


NO_SELECTION: Final = Path()


def _socket_path(value: str) -> Path:
    path = NO_SELECTION if value.lower() == "off" else _path(value)
    if len(os.fsencode(path)) > SOCKET_PATH_MAX_BYTES:
        raise ValueError("the system allows socket paths of 100 bytes")
    return path


def _loopback(value: str) -> tuple[str, int]:
    host, _, port = value.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if not ipaddress.ip_address(host).is_loopback:
        raise ValueError
    return host, _port(port)


def _file(value: str) -> Path:
    if not (path := _path(value)).is_file():
        raise ValueError
    return path


def _database_url(value: str) -> str:
    scheme, separator, rest = value.partition("://")
    if not (separator and rest and scheme in ("sqlite", "postgresql", "postgres")):
        raise ValueError
    return value


def _base_path(value: str) -> str:
    path = value.rstrip("/")
    if path and (not path.startswith("/") or "//" in path or any(character in path for character in "?#% ")):
        raise ValueError
    return path


def _origins(value: str) -> tuple[str, ...]:
    origins = _list(value)
    if any("://" not in origin and origin != "*" for origin in origins):
        raise ValueError
    return origins


def _list(value: str) -> tuple[str, ...]:
    return tuple(part for item in value.split(",") if (part := item.strip()))


def _networks(value: str) -> tuple[Network, ...]:
    if value.strip().lower() == "none":
        return ()
    networks: list[Network] = []
    for item in _list(value):
        networks.extend(LOOPBACK if item.lower() == "loopback" else (ipaddress.ip_network(item, strict=False),))
    if not networks:
        raise ValueError
    return tuple(networks)


def _aliases(value: str) -> tuple[tuple[str, tuple[str, ...]], ...]:
    aliases: dict[str, tuple[str, ...]] = {}
    for item in filter(None, (part.strip() for part in value.split(";"))):
        name, equals, models = item.partition("=")
        if not (name.strip() and equals and _list(models)) or name.strip() in aliases:
            raise ValueError
        aliases[name.strip()] = _list(models)
    return tuple(aliases.items())


def parse_upstream(url: str) -> Upstream:
    """Where `http://host:11434`, `http://host/prefix` or `host:port` leads, with Ollama's own default ports.

    Raises:
        ValueError: it is no such address; the text says what is wrong.
    """
    parts = urlsplit(url if "://" in url else f"http://{url}")
    if parts.scheme == "https":
        raise ValueError("nodes behind https cannot be used in this version")
    if parts.scheme != "http":
        raise ValueError(f"{parts.scheme}:// is not http://")
    if parts.username or parts.password or parts.query or parts.fragment:
        raise ValueError("only scheme, host, port and path may stand in a node's URL")
    if not parts.hostname or any(character.isspace() for character in parts.hostname):
        raise ValueError("the host is missing")
    default_port = 80 if "://" in url else OLLAMA_PORT
    port = parts.port if parts.port is not None else default_port
    if port == 0:
        raise ValueError("port 0 cannot be dialled")
    return Upstream(host=parts.hostname, port=port, base_path=parts.path.rstrip("/"))


def upstream_name(upstream: Upstream) -> str:
    """What a node is called that nobody named: `host:port`."""
    host = f"[{upstream.host}]" if ":" in upstream.host else upstream.host
    return f"{host}:{upstream.port}{upstream.base_path}"


def upstream_url(upstream: Upstream) -> str:
    """`upstream` as a URL without a slash at its end."""
    return f"http://{upstream_name(upstream)}"


def _backends(value: str) -> tuple[Backend, ...]:
    backends = [_backend(item) for item in _list(value)]
    if len({backend.name for backend in backends}) < len(backends) or len({backend.upstream for backend in backends}) < len(backends):
        raise ValueError("a node is there twice")
    return tuple(backends)


def _backend(item: str) -> Backend:
    address, *options = (part.strip() for part in item.split(";"))
    name, equals, url = address.partition("=")
    if not equals or "/" in name:
        name, url = "", address
    elif not name.strip():
        raise ValueError
    slots: int | None = None
    for option in options:
        key, _, given = option.partition("=")
        if key.strip() != "slots" or not 1 <= (slots := _integer(given.strip())) <= SLOTS_MAX:
            raise ValueError
    upstream = parse_upstream(url.strip())
    return Backend(name.strip() or upstream_name(upstream), upstream, slots)


# ---------------------------------------------------------------- the table


@dataclass(frozen=True, slots=True)
class Setting:
    """One row: the variable, the field it fills, how it is read, what it takes (in words), what it is for."""

    name: str
    field: str
    parse: Callable[[str], Any]
    takes: str
    about: str
    aliases: tuple[str, ...] = ()
    active: bool = True
    """False: read and checked, but nothing uses it in this version."""
    secret: bool = False


_SECONDS: Final = "a time above 0, such as 30, 500ms or 5m"
_SIZE: Final = "a size of 1 byte or more, such as 1048576 or 256MiB"
_COUNT: Final = "a whole number from 1"
_BOOL: Final = "true or false"
_TOKEN: Final = "8 or more printable characters without spaces"
_PORT: Final = "a port from 0 (any free one) to 65535"
_BACKENDS: Final = (
    "nodes separated by commas, each url or name=url, with ;slots=N after it if wished, each name once (gpu1=http://10.0.0.5:11434;slots=2)"
)

TABLE: Final[tuple[Setting, ...]] = (
    Setting("ROUTER_HOST", "host", _text, "an address to listen on", "address to listen on", ("COORDINATOR_HOST",)),
    Setting("ROUTER_PORT", "port", _port, _PORT, "port to listen on", ("COORDINATOR_PORT",)),
    Setting("ROUTER_OLLAMA_PORT", "ollama_port", _port, _PORT, "a second port, for clients that expect Ollama's own (11434)"),
    Setting(
        "DATABASE_URL", "database_url", _database_url, "sqlite://FILE or postgresql://USER@HOST/NAME", "where history is kept",
    ),
    Setting("ROUTER_DATA_DIR", "data_dir", _path, "a directory", "directory of secrets and data"),
    Setting("HEALTH_CHECK_INTERVAL", "health_check_interval_s", _seconds, _SECONDS, "full check of a node without an agent"),
    Setting("AGENT_TIMEOUT", "agent_timeout_s", _seconds, _SECONDS, "silence after which a node is offline", ("NODE_TIMEOUT",)),
    Setting("LOAD_BALANCER_MODE", "load_balancer_mode", _one_of(*STRATEGIES), f"one of {', '.join(STRATEGIES)}", "how a node is chosen"),
    Setting("OLLAMA_BACKENDS", "backends", _backends, _BACKENDS, "nodes without an agent"),
    Setting("ROUTER_ALIASES", "aliases", _aliases, "name=model,model;name=model", "other names for models"),
    Setting("ROUTER_RAISE_CONTEXT", "raise_context", _bool, _BOOL, "raise a smaller num_ctx to the loaded one, to spare a reload"),
    Setting("ROUTER_RESUME", "resume", _one_of("off", "text"), "off or text", "resume an answer elsewhere in mid-stream"),
    Setting("ROUTER_CLOUD", "cloud", _bool, _BOOL, "cloud models allowed", active=False),
    Setting("ROUTER_PRELOAD", "preload", _bool, _BOOL, "placement may load models", active=False),
    Setting("ROUTER_NGINX_DIRECT", "nginx_direct", _bool, _BOOL, "nginx talks to nodes without an agent straight"),
    Setting("ROUTER_SELECTION", "selection", _socket_path, "the path of a socket, or off", "where nginx asks which node to take"),
    Setting("ROUTER_TALLY", "tally", _loopback, "host:port on this machine", "where nginx reports what ended"),
    Setting("HISTORY_JSON", "history_json", _bool, _BOOL, "mirror of the newest records in a JSON file"),
    Setting("ROUTER_REQUIRE_GPU", "require_gpu", _bool, _BOOL, "agents that register from elsewhere must have a GPU"),
    Setting("ROUTER_AUTH", "auth", _one_of("auto", "required", "off"), "one of auto, required, off", "who must show a token"),
    Setting("ROUTER_ADMIN_TOKEN", "admin_token", _token, _TOKEN, "admin token; made and kept in the data directory if absent", secret=True),
    Setting("ROUTER_JOIN_TOKEN", "join_token", _token, _TOKEN, "a join token that does not expire", secret=True),
    Setting("ROUTER_REQUIRE_API_KEY", "require_api_key", _bool, _BOOL, "everyone needs an API key, or the admin token, for inference"),
    Setting("ROUTER_QUEUE_MAX", "queue_max", _positive, _COUNT, "requests that may wait in all"),
    Setting("ROUTER_QUEUE_PER_CLIENT", "queue_per_client", _positive, _COUNT, "requests that one client may have waiting"),
    Setting("ROUTER_QUEUE_TIMEOUT", "queue_timeout_s", _seconds, _SECONDS, "longest wait for a node"),
    Setting("ROUTER_BODY_MAX_BYTES", "body_max_bytes", _bytes, _SIZE, "largest request body"),
    Setting("ROUTER_BODY_MEMORY_BYTES", "body_memory_bytes", _bytes, _SIZE, "memory for request bodies; more is spooled to disk"),
    Setting("ROUTER_FIRST_TOKEN_TIMEOUT", "first_token_timeout_s", _seconds, _SECONDS, "longest silence before the first token (no limit)"),
    Setting("ROUTER_STALL_TIMEOUT", "stall_timeout_s", _seconds, _SECONDS, "longest silence in mid-answer (no limit)"),
    Setting(
        "ROUTER_ORIGINS", "origins", _origins, "origins such as https://chat.example, separated by commas", 
        "web pages that may call, beside those that Ollama lets",
    ),
    Setting("ROUTER_BASE_PATH", "base_path", _base_path, "a path such as /ollama", "path prefix of all routes"),
    Setting(
        "ROUTER_AUTO_DISTRIBUTE", "auto_distribute", _bool, _BOOL, "nodes whose Ollama the agent installed get a model when they have none"
    ),
    Setting(
        "HISTORY_RETENTION_DAYS", "history_retention_days", _integer, "days, a whole number; 0: nothing is recorded", "age of kept records",
    ),
    Setting("HISTORY_MAX_BYTES", "history_max_bytes", _bytes, _SIZE, "size of all kept records"),
    Setting("HISTORY_BODY_MAX_BYTES", "history_body_max_bytes", _bytes, _SIZE, "largest body that is kept whole"),
    Setting(
        "HISTORY_BODIES", "history_bodies", _one_of("full", "redacted", "off"), "one of full, redacted, off", "what is kept of bodies",
    ),
    Setting("HISTORY_MASK", "history_mask", _masks, "paths, comma separated, such as messages[].content", "what of kept bodies is masked"),
    Setting("ROUTER_TLS_CERT", "tls_cert", _file, "a file that exists", "TLS certificate", active=False),
    Setting("ROUTER_TLS_KEY", "tls_key", _file, "a file that exists", "key of the TLS certificate", active=False),
    Setting(
        "ROUTER_TRUSTED_PROXIES", "trusted_proxies", _networks, "addresses or networks separated by commas, loopback, or none",
        "who may set X-Forwarded-For",
    ),
    Setting(
        "ROUTER_LOG_LEVEL", "log_level", _one_of("debug", "info", "warning", "error"), "one of debug, info, warning, error",
        "log level",
    ),
    Setting(
        "ROUTER_LOG_FORMAT", "log_format", _one_of("console", "json"), "console or json",
        "log format (console on a terminal, else json)",
    ),
    Setting("ROUTER_STOP_TIMEOUT", "stop_timeout_s", _seconds, _SECONDS, "how long answers may take to end at a stop"),
)  # fmt: skip

CONFIG_VARIABLE: Final = "OLLAMA_ROUTER_CONFIG"


def load(environment: Mapping[str, str], *, config_file: Path | None = None) -> Settings:
    """The settings that `environment` and the TOML file make together.

    `config_file` (from the command line) wins over `OLLAMA_ROUTER_CONFIG`. An empty variable counts as absent.

    Raises:
        ConfigError: a value cannot be used; one line that names it.
    """
    if config_file is None and (named := environment.get(CONFIG_VARIABLE)):
        config_file = Path(named).expanduser()
    file_values = _read_toml(config_file) if config_file is not None else {}
    values: dict[str, Any] = {}
    warnings: list[str] = []
    for setting in TABLE:
        given = _given(setting, environment, warnings) or file_values.get(setting.name)
        if given is None:
            continue
        values[setting.field] = _parsed(setting, given)
        if not setting.active:
            warnings.append(f"{setting.name} is set, but nothing uses it in this version")
    return _checked(values, warnings)


def _given(setting: Setting, environment: Mapping[str, str], warnings: list[str]) -> str | None:
    """The variable's value, under its name or an older one."""
    value = environment.get(setting.name, "").strip() or None
    for alias in setting.aliases:
        old = environment.get(alias, "").strip()
        if old and value is None:
            warnings.append(f"{alias} is an old name: use {setting.name}")
            value = old
        elif old:
            warnings.append(f"{alias} is ignored, since {setting.name} is set too")
    return value


def _parsed(setting: Setting, given: str) -> Any:
    try:
        return setting.parse(given)
    except (ValueError, KeyError, OverflowError) as error:
        shown = "that" if setting.secret else repr(given)
        why = f" ({error})" if error.args and str(error).isascii() and " " in str(error) and not setting.secret else ""
        raise ConfigError(f"{setting.name} takes {setting.takes}, not {shown}{why}") from None


def _checked(values: dict[str, Any], warnings: list[str]) -> Settings:
    """What can only be judged together."""
    if "queue_per_client" not in values:
        values["queue_per_client"] = min(64, values.get("queue_max", 64))
    if "tls_cert" in values or "tls_key" in values:
        raise ConfigError("ROUTER_TLS_CERT and ROUTER_TLS_KEY cannot be used in this version: put a proxy that speaks TLS in front")
    settings = Settings(**values, warnings=tuple(warnings))
    if settings.body_max_bytes > settings.body_memory_bytes * 1024:
        raise ConfigError("ROUTER_BODY_MAX_BYTES may not be above 1024 times ROUTER_BODY_MEMORY_BYTES")
    settings.router_config()
    return settings


def _read_toml(path: Path) -> dict[str, str]:
    """The file's values as an environment would spell them; keys are the variables' names in any case."""
    try:
        if path.stat().st_size > TOML_MAX_BYTES:
            raise ConfigError(f"the settings file {path} is larger than {TOML_MAX_BYTES} bytes")
        document = tomllib.loads(path.read_text("utf-8"))
    except OSError as error:
        raise ConfigError(f"the settings file {path} cannot be read: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"the settings file {path} is not valid TOML: {error}") from None
    known = {setting.name for setting in TABLE}
    values: dict[str, str] = {}
    for key, value in document.items():
        name = key.upper()
        if name not in known:
            raise ConfigError(f"the settings file {path} has an unknown key {key!r}: keys are the names of the environment variables")
        values[name] = _toml_text(path, key, value)
    return values


def _toml_text(path: Path, key: str, value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (str, int, float)):
        return str(value)
    if isinstance(value, list) and all(isinstance(item, str) for item in value):
        return ",".join(value)
    raise ConfigError(f"the settings file {path} gives {key!r} a value that is neither text, a number, true/false nor a list of texts")
