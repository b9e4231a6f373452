"""The catalogue of models that one may want: what comes with this package, or the operator's own file, merged with what the fleet holds.

Decides sizes that are told before a download. Invariant: a catalogue file that cannot be used is a `ConfigError` of one line at the
start, never a surprise later.
"""

from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any, Final

import msgspec

from core.errors import ConfigError, RemoteError
from core.names import display, key_or_none, normalise
from core.units import ModelKey

FILE: Final = "catalogue.json"
"""Its name in the data directory, where the operator's own lies."""
GB: Final = 10**9
FILE_MAX_BYTES: Final = 4 << 20


class Entry(msgspec.Struct, frozen=True, kw_only=True):
    """One model; sizes in GB (10^9 bytes)."""

    name: str
    display_name: str = ""
    size_gb: float | None = None
    required_memory_gb: float | None = None
    description: str = ""
    tags: list[str] = []


class Catalogue:
    """What may be downloaded. `source`: `packaged`, or `file`."""

    def __init__(self, entries: Sequence[Entry], *, source: str) -> None:
        self.source = source
        self.entries: dict[ModelKey, Entry] = {normalise(entry.name): entry for entry in entries}

    def sizes(self) -> dict[ModelKey, int]:
        """Bytes of each model that has a size."""
        return {key: round(entry.size_gb * GB) for key, entry in self.entries.items() if entry.size_gb is not None}

    def with_fleet(self, held: Mapping[ModelKey, tuple[int | None, Sequence[str]]]) -> list[dict[str, Any]]:
        """All that is known, and where it is: first the catalogue's, then what only the fleet has. `held`: bytes and names of nodes."""
        shown = [
            {**msgspec.structs.asdict(entry), "installed_on": list(held.get(key, (None, ()))[1])} for key, entry in self.entries.items()
        ]
        for key in sorted(held.keys() - self.entries.keys()):
            size, nodes = held[key]
            name = display(key)
            size_gb = None if size is None else round(size / GB, 2)
            shown.append({**msgspec.structs.asdict(Entry(name=name, display_name=name, size_gb=size_gb)), "installed_on": list(nodes)})
        return shown


def read_catalogue(data_dir: Path) -> Catalogue:
    """The operator's `catalogue.json` in the data directory, else the one that comes with the package.

    Raises:
        ConfigError: the file cannot be used.
    """
    path = data_dir / FILE
    try:
        if path.is_file():
            if path.stat().st_size > FILE_MAX_BYTES:
                raise ConfigError(f"the catalogue {path} is larger than {FILE_MAX_BYTES} bytes")
            return Catalogue(msgspec.json.decode(path.read_bytes(), type=list[Entry]), source="file")
    except OSError as error:
        raise ConfigError(f"the catalogue {path} cannot be read: {error.strerror}") from None
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise ConfigError(f"the catalogue {path} cannot be used: {error}") from None
    except RemoteError as error:
        raise ConfigError(f"the catalogue {path} names a model that cannot be: {error}") from None
    return packaged()


def packaged() -> Catalogue:
    """The one that comes with the package."""
    return Catalogue(msgspec.json.decode(files("servers").joinpath(FILE).read_bytes(), type=list[Entry]), source="packaged")


def held_by(rows_by_node: Mapping[str, Sequence[Any]]) -> dict[ModelKey, tuple[int | None, list[str]]]:
    """What nodes hold: per model its bytes and the names of its nodes."""
    held: dict[ModelKey, tuple[int | None, list[str]]] = {}
    for node, rows in rows_by_node.items():
        for row in rows:
            name = (row.get("name") or row.get("model")) if isinstance(row, dict) else row
            key = key_or_none(name) if isinstance(name, str) else None
            if key is None:
                continue
            size = row.get("size") if isinstance(row, dict) else None
            known, nodes = held.get(key, (None, []))
            held[key] = (size if isinstance(size, int) else known, nodes if node in nodes else [*nodes, node])
    return held
