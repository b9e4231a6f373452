"""Names of models: which spellings mean one model, and which mean none.

Decides by Ollama's own rules: `[scheme://][host/][namespace/]model[:tag][:local|:cloud]`, compared without case. Never knows which
models exist. Keys serve to compare and to look up; on the wire a name always travels as its client spelled it.

Invariants: `normalise(display(key)) == key`; a key has all four parts, in lower case; its tag is `cloud` or ends in `-cloud` exactly
when Ollama would send the request away to its cloud.
"""

import functools
import re
from typing import Final

from core.errors import RemoteError
from core.units import ModelKey

DEFAULT_HOST: Final = "registry.ollama.ai"
DEFAULT_NAMESPACE: Final = "library"
DEFAULT_TAG: Final = "latest"

CACHE_MAX: Final = 4096
"""Spellings whose key is remembered."""

CACHED_LENGTH_MAX: Final = 600
"""Longer spellings are read anew each time, so that the cache stays small."""

_SPACE: Final = "\t\n\v\f\r \x85\xa0\u1680\u2000\u2001\u2002\u2003\u2004\u2005\u2006\u2007\u2008\u2009\u200a\u2028\u2029\u202f\u205f\u3000"
"""What Ollama trims (Unicode white space; unlike `str.strip()` not U+001C to U+001F)."""

# Ollama takes hosts up to 350 characters and then fails to open a file of such a name: the limit that works is a file name's.
_HOST = re.compile(r"[a-z0-9_][a-z0-9_.:-]{0,254}").fullmatch
_NAMESPACE = re.compile(r"[a-z0-9_][a-z0-9_-]{0,79}").fullmatch
_PART = re.compile(r"[a-z0-9_][a-z0-9_.-]{0,79}").fullmatch


def normalise(spelling: str) -> ModelKey:
    """The key of the model that `spelling` names.

    Raises:
        RemoteError: 400, with Ollama's own text, when it names none.
    """
    key = key_or_none(spelling)
    if key is not None:
        return key
    trimmed = spelling.strip(_SPACE)
    if not trimmed:
        raise RemoteError("model is required")
    base, source = _cut_source(trimmed)
    if source and _cut_source(base)[1]:
        raise RemoteError(f'use either :local or :cloud, not both: "{trimmed}"')
    raise RemoteError("invalid model name")


def key_or_none(spelling: str) -> ModelKey | None:
    """The key of the model that `spelling` names, None when it names none. Cheap for spellings seen before."""
    return _remembered(spelling) if len(spelling) <= CACHED_LENGTH_MAX else _parse(spelling)


def display(key: ModelKey) -> str:
    """The short form that Ollama shows: without the default host and namespace, always with the tag."""
    host, _, rest = key.partition("/")
    return rest.removeprefix(f"{DEFAULT_NAMESPACE}/") if host == DEFAULT_HOST else str(key)


def is_cloud(key: ModelKey) -> bool:
    """Whether a node would pass a request for this model on to Ollama's cloud."""
    return key.endswith("cloud") and (key.endswith((":cloud", "-cloud")) or key == "cloud")


def namespace(spelling: str) -> str:
    """The namespace in a valid name, in its own letter case."""
    parts = spelling.split("/")
    return parts[-2] if len(parts) > 1 else DEFAULT_NAMESPACE


def _parse(spelling: str) -> ModelKey | None:
    name, source = _cut_source(spelling.strip(_SPACE))
    if not name.isascii() or (source and _cut_source(name)[1]):
        return None
    host, space, model, tag = DEFAULT_HOST, DEFAULT_NAMESPACE, name.lower(), DEFAULT_TAG
    if model.rfind(":") > model.rfind("/"):
        model, _, tag = model.rpartition(":")
        tag += "-cloud" if source == "cloud" else ""
        if tag == "-cloud":
            return None
    elif source == "cloud":
        tag = "cloud"
    rest, slash, model = model.rpartition("/")
    if slash:
        rest, slash, space = rest.rpartition("/")
    if slash:
        scheme, mark, after = rest.partition("://")
        host = after or DEFAULT_HOST if mark else scheme
    if not (_HOST(host) and _NAMESPACE(space) and _PART(model) and _PART(tag.removesuffix("-cloud"))):
        return None
    return ModelKey(f"{host}/{space}/{model}:{tag}")


def _cut_source(name: str) -> tuple[str, str]:
    """`name` without `:local`, `:cloud` or a tag's `-cloud`, and which of the two it said ("" for neither)."""
    before, colon, last = name.rpartition(":")
    last = last.strip(_SPACE)
    word = last.lower()
    if not colon or "/" in word:
        return name, ""
    if word in ("cloud", "local"):
        return before, word
    if word.endswith("-cloud"):
        return f"{before}:{last[: -len('-cloud')]}", "cloud"
    return name, ""


_remembered = functools.lru_cache(maxsize=CACHE_MAX)(_parse)
