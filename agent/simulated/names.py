"""The names of models, read the two ways in which Ollama reads them.

Decides what a spelling means and in which words a bad one is refused. Most requests trim a name and read `:local` and `:cloud` off its
end (`parse_name`); copies, pushes and the targets of creations take it as it is (`literal_name`).

Invariant: names that differ in letter case alone have one key.
"""

import re
from collections.abc import Iterable
from typing import Final

from agent.simulated.reading import Refusal

DEFAULT_HOST: Final = "registry.ollama.ai"
PART: Final = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,79}")
NAMESPACE: Final = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_-]{0,79}")
HOST: Final = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.:-]{0,349}")
CHECKS: Final = (HOST, NAMESPACE, PART, PART)
FILE_NAME_BYTES: Final = 255
"""Longer hosts are fine as names, but not as directories."""
CLOUD_OFF: Final = "ollama cloud is disabled: remote model is unavailable"
MODELS_PATH: Final = "/usr/share/ollama/.ollama/models"
"""Where a simulated node says that its files are: Ollama shows such paths in some errors."""
QUOTES: Final = {"\\": "\\\\", '"': '\\"', "\n": "\\n", "\t": "\\t", "\r": "\\r", "\a": "\\a", "\b": "\\b", "\f": "\\f", "\v": "\\v"}

Parts = tuple[str, str, str, str]
"""Host, namespace, model, tag."""


def quoted(text: str) -> str:
    """`text` as Go's `%q` shows it."""
    out = []
    for character in text:
        code = ord(character)
        if character in QUOTES:
            out.append(QUOTES[character])
        elif character.isprintable():
            out.append(character)
        else:
            out.append(f"\\x{code:02x}" if code < 0x80 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}")
    return f'"{"".join(out)}"'


def loose_parts(spelling: str) -> Parts:
    """The parts of `spelling`, whether or not they are good ones."""
    rest = spelling.partition("://")[2] if "://" in spelling else spelling
    before, _, last = rest.rpartition("/")
    model, colon, tag = last.partition(":")
    host, _, namespace = before.rpartition("/")
    return host or DEFAULT_HOST, namespace or "library", model, tag if colon else "latest"


def literal_name(spelling: str) -> Parts | None:
    """The parts of `spelling` as it stands, or None where it is no name."""
    rest = spelling.partition("://")[2] if "://" in spelling else spelling
    parts = loose_parts(spelling)
    if not all(rest.split("/")) or rest.count("/") > 2:
        return None
    return parts if all(check.fullmatch(part) for check, part in zip(CHECKS, parts, strict=True)) else None


def split_source(spelling: str) -> tuple[str, str]:
    """The name, trimmed, and what its end says of where to run it: `local`, `cloud` or nothing. Raises `Refusal` (400) for two."""
    name = spelling.strip()
    sources = []
    while True:
        before, colon, last = name.rpartition(":")
        if colon and (source := last.strip().lower()) in ("cloud", "local"):
            name = before.strip()
            sources.append(source)
        elif colon and "/" not in last and last.lower().endswith("-cloud"):
            name = name[: -len("-cloud")]
            sources.append("cloud")
        else:
            break
    if len(sources) > 1:
        raise Refusal(400, f"use either :local or :cloud, not both: {quoted(spelling)}")
    return name, sources[0] if sources else ""


def parse_name(spelling: str, *, service: str = "remote model is unavailable") -> Parts:
    """Host, namespace, model and tag of `spelling`, letter case kept. Raises `Refusal`; `service` is what cloud names lack."""
    name, source = split_source(spelling)
    parts = literal_name(name)
    if parts is None:
        raise Refusal(400, "invalid model name")
    if source == "cloud":
        raise Refusal(403, CLOUD_OFF.replace("remote model is unavailable", service))
    check_length(parts)
    return parts


def check_length(parts: Parts, *, making: bool = False) -> None:
    """Raises `Refusal` (500) where the name does not fit into a directory, in the words of reading it or of `making` it."""
    if len(parts[0]) > FILE_NAME_BYTES:
        what = f"mkdir {MODELS_PATH}/manifests/{parts[0]}" if making else f"open {MODELS_PATH}/manifests/{'/'.join(parts)}"
        raise Refusal(500, f"{what}: file name too long")


def key_of(parts: Parts) -> tuple[str, ...]:
    """What spellings of one name have in common."""
    return tuple(part.lower() for part in parts)


def shown(parts: Parts) -> str:
    """The name as lists show it: defaults left out, the tag kept."""
    host, namespace, model, tag = parts
    if host.lower() != DEFAULT_HOST:
        return f"{host}/{namespace}/{model}:{tag}"
    return f"{model}:{tag}" if namespace.lower() == "library" else f"{namespace}/{model}:{tag}"


def full(parts: Parts) -> str:
    """The name with everything."""
    return f"{parts[0]}/{parts[1]}/{parts[2]}:{parts[3]}"


def display_name(spelling: str) -> str:
    """The name as lists show it. Raises `Refusal` as `parse_name` does."""
    return shown(parse_name(spelling))


def adopted(parts: Parts, known: Iterable[Parts]) -> Parts:
    """`parts` in the letter case that the same parts have in names that are there."""
    others = list(known)
    own = next((other for other in others if key_of(other) == key_of(parts)), None)
    if own is not None:
        return own
    spelled = {(place, part.lower()): part for other in reversed(others) for place, part in enumerate(other)}
    host, namespace, model, tag = (spelled.get((place, part.lower()), part) for place, part in enumerate(parts))
    return host, namespace, model, tag
