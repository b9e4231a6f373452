"""Making models on a simulated node: from another one, or from files that were sent before.

Decides what a request to `/api/create` makes, and its lines. What is in a file is not looked at, but for its first four bytes.

Invariant: equal requests on equal nodes make equal digests.
"""

import hashlib
from contextlib import aclosing
from typing import Any, Final

import msgspec
import trio

from agent.simulated.answers import go_json
from agent.simulated.library import GGUF, Library, blob_digest, blob_path
from agent.simulated.models import Layer, SimulatedModel, text_layer
from agent.simulated.names import Parts, literal_name, parse_name, shown
from agent.simulated.reading import Refusal
from agent.simulated.transfer import Lines, Transfers

QUANTIZATIONS: Final = {"F32": 2.0, "F16": 1.0, "Q4_K_S": 0.29, "Q4_K_M": 0.31, "Q8_0": 0.53}
"""And their sizes, relative to F16."""
QUANTIZE_BYTES_S: Final = 600e6
REWRITTEN_BYTES: Final = 32
"""By so much the stored weights are larger than the file that was sent."""


def target(fields: dict[str, Any]) -> Parts:
    """The name to be made. Raises `Refusal` (400), also for files that cannot be."""
    parts = literal_name(fields.get("model") or fields.get("name") or "")
    if parts is None:
        raise Refusal(400, "invalid model name")
    for path, digest in {**fields.get("files", {}), **fields.get("adapters", {})}.items():
        if str(path).startswith("/") or ".." in str(path).split("/"):
            raise Refusal(400, "file path must be relative")
        if not digest:
            raise Refusal(400, "invalid digest format")
    return parts


def _late(status: int, text: str) -> Refusal:
    return Refusal(status, text, early=False)


class Creating:
    """The creations of one node."""

    def __init__(self, library: Library, transfers: Transfers) -> None:
        self._library = library
        self._transfers = transfers

    async def create(self, parts: Parts, fields: dict[str, Any]) -> Lines:
        """The lines of a creation. Raises `Refusal`, before the first line or as the last."""
        level = str(fields.get("quantize", "")).upper()
        if level and level not in QUANTIZATIONS:
            supported = ", ".join(QUANTIZATIONS)
            raise _late(500, f"unsupported quantization type {level} - supported types are {supported}")
        if fields.get("from"):
            async with aclosing(self._base(str(fields["from"]))) as lines:
                async for line in lines:
                    yield line
            base, parent = self._from(str(fields["from"])), str(fields["from"]).strip()
        elif "files" in fields:
            if any(str(path).endswith(".gguf") for path in fields["files"]):
                yield {"status": "parsing GGUF"}
            base, parent = self._from_files(parts, fields["files"]), ""
            yield {"status": "verifying conversion"}
        else:
            raise _late(400, "neither 'from' or 'files' was specified")
        if fields.get("adapters"):
            yield {"status": "parsing GGUF"}
            for digest in fields["adapters"].values():
                self._file(str(digest), missing=400)
        if level and level != base.quantization.upper():
            await trio.sleep(base.size_bytes / QUANTIZE_BYTES_S)
            base = _quantized(base, level)
            yield {"status": "verifying conversion"}
        made, layers = _made(base, parent and shown(parse_name(parent)), fields)
        self._library.check_room(sum(layer.size_bytes for layer in made.all_layers if layer.digest not in self._library.blobs))
        for layer in layers:
            verb = "using existing" if layer.digest in self._library.blobs else "creating new"
            yield {"status": f"{verb} layer sha256:{layer.digest}"}
        yield {"status": "writing manifest"}
        for layer in made.all_layers:
            self._library.receive(layer)
        self._library.write(parts, made)
        yield {"status": "success"}

    def _stored(self, spelling: str) -> SimulatedModel | None:
        """The model of that very name: here alone letter case counts."""
        parts = parse_name(spelling)
        model = self._library.at(parts)
        return model if model is not None and model.parts == parts else None

    async def _base(self, spelling: str) -> Lines:
        """What happens before the model to start from is there: it may have to be pulled."""
        try:
            stored = self._stored(spelling)
        except Refusal as refusal:
            raise _late(refusal.status, refusal.text) from None
        if stored is None:
            async with aclosing(self._transfers.pull(spelling)) as lines:
                async for line in lines:
                    if line["status"] != "success":
                        yield line

    def _from(self, spelling: str) -> SimulatedModel:
        model = self._library.find(spelling)
        assert model is not None, "what was pulled is there"
        return model

    def _file(self, digest: str, *, missing: int = 500) -> Layer:
        """The blob of a file. Raises `Refusal`."""
        try:
            hexadecimal = blob_digest(digest)
        except Refusal as refusal:
            raise _late(500, refusal.text) from None
        blob = self._library.blobs.get(hexadecimal)
        if blob is None:
            raise _late(missing, f"open {blob_path(hexadecimal)}: no such file or directory")
        if blob.magic != GGUF:
            raise _late(400, "supplied file was not in GGUF format")
        return Layer(hexadecimal, blob.size_bytes)

    def _from_files(self, parts: Parts, files: dict[str, Any]) -> SimulatedModel:
        if not any(path.endswith(".gguf") for path in files):
            known = [self._library.blobs.get(str(digest)[7:]) for digest in files.values()]
            if not any(blob is not None and blob.magic == GGUF for blob in known):
                raise _late(400, "unknown type")
        sent, *_ = [self._file(str(digest)) for digest in files.values()]
        rewritten = hashlib.sha256(f"rewritten {sent.digest}".encode()).hexdigest()
        weights = Layer(rewritten, sent.size_bytes + REWRITTEN_BYTES)
        size = weights.size_bytes
        return SimulatedModel(name=shown(parts), size_bytes=size, weights=rewritten, layers=(weights,), quantization="F16")


def _quantized(base: SimulatedModel, level: str) -> SimulatedModel:
    """`base` with other weights."""
    scale = QUANTIZATIONS[level] / QUANTIZATIONS.get(base.quantization.upper(), 1.0)
    old = base.all_layers[0]
    digest = hashlib.sha256(f"{level} {old.digest}".encode()).hexdigest()
    weights = Layer(digest, int(old.size_bytes * scale))
    return msgspec.structs.replace(base, quantization=level, weights=digest, layers=(weights, *base.all_layers[1:]))


def _made(base: SimulatedModel, parent: str, fields: dict[str, Any]) -> tuple[SimulatedModel, list[Layer]]:
    """The model, and the layers that are told of: all but its configuration. Raises `Refusal`."""
    template = fields.get("template") or base.template
    if template.count("{{") != template.count("}}"):
        raise _late(400, "template error: template: :1: unclosed action")
    given = fields.get("license")
    if given is not None and not isinstance(given, (str, list)):
        kind = (
            "number" if isinstance(given, (int, float)) and not isinstance(given, bool) else "object" if isinstance(given, dict) else "bool"
        )
        raise _late(500, f"json: cannot unmarshal {kind} into Go value of type []string")
    licenses = tuple(base.license) if given is None else (given,) if isinstance(given, str) else tuple(map(str, given))
    said = fields.get("messages") or [{"role": role, "content": content} for role, content in base.messages]
    messages = tuple((str(message.get("role", "")), str(message.get("content", ""))) for message in said)
    parameters = {**base.parameters, **(fields.get("parameters") or {})}
    system = fields.get("system") or base.system
    texts = [
        template,
        system,
        *licenses,
        go_json(parameters).decode() if parameters else "",
        go_json(messages).decode() if messages else "",
    ]
    layers = [base.all_layers[0], *(text_layer(text) for text in texts if text)]
    config = text_layer(f"configuration of {parent} {[layer.digest for layer in layers]}")
    made = msgspec.structs.replace(
        base,
        digest=hashlib.sha256(config.digest.encode()).hexdigest(),
        weights=base.weights or base.hex_digest,
        size_bytes=sum(layer.size_bytes for layer in layers) + config.size_bytes,
        template=template,
        system=system,
        license=licenses,
        parameters=parameters,
        messages=messages,
        parent_model=parent,
        layers=(*layers, config),
    )
    return made, layers
