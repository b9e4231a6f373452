"""Bodies read with Python's own JSON reader: what the router's readers are held against."""

import json
import re
from typing import Any

from core.events import Protocol, Route


class Pairs(list[tuple[str, Any]]):
    """An object's members as they stand, repeated ones included."""


def _refuse(_: str) -> Any:
    raise ValueError("Go has no such number")


def _characters(text: str) -> str:
    return re.sub("[\ud800-\udfff]", "\ufffd", text)


def python_reads(data: bytes) -> Any:
    """The first value; `ValueError` when there is none. Objects are `Pairs`, bytes that are no characters U+FFFD each."""
    text = re.sub("[\udc80-\udcff]", "\ufffd", data.decode("utf-8", "surrogateescape")).lstrip(" \t\r\n")
    decoder = json.JSONDecoder(
        object_pairs_hook=lambda pairs: Pairs((_characters(key), value) for key, value in pairs), parse_constant=_refuse
    )
    return decoder.raw_decode(text)[0]


def _integer(value: Any) -> int | None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or abs(value) >= 2**63:
        return None
    return int(value)


def facts(data: bytes, route: Route) -> dict[str, Any] | None:
    """What Ollama makes of a body, by the rules of Go's decoder written down once more; None: no JSON object."""
    try:
        value = python_reads(data)
    except ValueError:
        return None
    if value is not None and not isinstance(value, Pairs):
        return None
    native = route.protocol is Protocol.NATIVE
    fields: dict[str, Any] = {}
    options: dict[str, Any] = {}
    bad_model = False
    for key, item in value or ():
        name = "".join({"\u212a": "k", "\u017f": "s"}.get(c, c.lower() if c.isascii() else c) for c in key)
        if name == "options":
            if item is None:
                options = {}
            elif isinstance(item, Pairs):
                options.update(item)
        elif name == "model" and item is not None and not isinstance(item, str):
            bad_model = True
        elif item is not None:
            fields[name] = item
        elif name not in ("model", "prompt") and (native or name != "stream"):
            fields.pop(name, None)
    model = None if bad_model else _characters(fields.get("model", "")) or None
    stream = fields.get("stream")
    asked = fields.get("messages" if route is Route.CHAT else "prompt")
    load_only = native and (asked is None or asked in ("", []) or asked == Pairs())
    limits = (
        [options.get("num_predict")]
        if native
        else [fields.get(name) for name in ("max_tokens", "max_completion_tokens", "max_output_tokens")]
    )
    told = [limit for limit in map(_integer, limits) if limit is not None and limit >= 0]
    reloading = {name: _integer(options.get(name)) for name in ("num_ctx", "num_gpu")}
    shown = [f"{name}={number}" for name, number in sorted(reloading.items()) if number is not None]
    if isinstance(options.get("use_mmap"), bool):
        shown.append(f"use_mmap={str(options['use_mmap']).lower()}")
    if isinstance(fields.get("shift"), bool):
        shown.append(f"shift={str(fields['shift']).lower()}")
    tools, form = fields.get("tools"), fields.get("format")
    kept = fields.get("keep_alive")
    return {
        "model": model,
        "stream": stream if isinstance(stream, bool) else route.streams_by_default,
        "runner_options": ",".join(shown) if native else "",
        "output_limit": min(told, default=None),
        "constrained": tools not in (None, "", [])
        or (form not in (None, "", []) if native else "response_format" in fields or "text" in fields),
        "load_only": load_only,
        "unload": load_only
        and not isinstance(kept, bool)
        and (kept in ("0", "0s", "0h0.0m") or (isinstance(kept, (int, float)) and 0 <= kept < 1e-9)),
    }
