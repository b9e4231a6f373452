"""The router's hot modules, compiled: which they are, where what was made of them lies, and whether it is of this source.

Compiled by mypyc (`python -m native`), the same source runs without CPython's interpreter: a decision takes half as long, and so does what
the edge does for a small request. Nothing else differs, and nothing depends on it: without a compiler the modules run as they are. What was
compiled lies apart from the source, so tests, coverage and debuggers see Python as long as nobody calls `use`.

mypyc's mistakes are to be written around (`tests/native` looks for the first two): a call in a slice's bounds is made twice; one name
in two `except` clauses holds the first one's class only; a slice of bytes whose end lies before its start raises SystemError; keywords
behind a structure's bases are lost (`core.structs`). A parameter takes none but the class it names.

Decides whether a process runs what was compiled. Invariant: never what was made of other source, by another Python, or only a part of it.
"""

import hashlib
import importlib
import os
import sys
import sysconfig
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).parents[1]
PACKAGES: Final = ("core", "edge", "servers", "servers.store")
"""Those with compiled modules; a change in any of their files asks for a new compilation."""
MODULES: Final = tuple(
    f"{package}.{name}"
    for package, names in {
        "core": (
            "advice", "affinity", "agents", "changes", "dispatch", "displacement", "explained", "health", "heat", "history", "inventory",
            "leaks", "learning", "leases", "names", "obstacles", "parts", "queue", "registry", "requests", "room", "router", "scoring",
            "slots", "turns", "warm",
        ),
        "edge": (
            "body", "capture", "desk", "facts", "handover", "headers", "live", "pool", "proxy", "quick", "relay", "selection", "tally",
            "verdicts", "wire", "wire_client", "wire_heads", "wire_watch",
        ),
        "servers": ("clock", "drafts", "driver", "history", "metrics", "sinks", "tape"),
        "servers.store": ("outbox", "packed"),
    }.items()
    for name in names
)  # fmt: skip
"""Compiled together: a class of one is known to the others, and none of them may have an heir in a module that is not here."""
SETTING: Final = "ROUTER_NATIVE"
"""Environment variable; `false`: run the source as it is."""


def path_of(name: str) -> Path:
    """Of a package or a module, without its ending, from where all of them lie."""
    return Path(*name.split("."))


def place() -> Path:
    """Where what is compiled of this source for this Python lies, or would lie."""
    made_of = hashlib.sha256(f"{sysconfig.get_config_var('EXT_SUFFIX')} {sys.hexversion:x} {MODULES}".encode())
    for package in PACKAGES:
        for path in sorted((ROOT / path_of(package)).glob("*.py")):
            made_of.update(f"{path.name} {path.stat().st_size}\n".encode() + path.read_bytes())
    return Path(__file__).parent / "build" / made_of.hexdigest()[:16]


def found() -> Path | None:
    """What a program that starts now would run; None: the source as it is."""
    if os.environ.get(SETTING, "true").lower() in ("false", "0", "no", "off"):
        return None
    compiled = place()
    return compiled if compiled.is_dir() else None


def use() -> bool:
    """Run what is compiled from now on, if it is there; whether it is. To be called before any of the modules is imported: later it is
    too late, and nothing happens."""
    compiled = found()
    if compiled is None or not sys.modules.keys().isdisjoint(MODULES):
        return False
    sys.path.append(str(compiled))
    for package in PACKAGES:
        importlib.import_module(package).__path__.insert(0, str(compiled / path_of(package)))
    return True


def in_use() -> bool:
    """Whether this process runs what was compiled."""
    files = (getattr(sys.modules.get(name), "__file__", None) or "" for name in MODULES)
    return any(Path(file).is_relative_to(Path(__file__).parent) for file in files)
