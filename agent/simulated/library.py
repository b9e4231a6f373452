"""What a simulated Ollama has on its disk: blobs, and names that stand for lists of them.

Decides what a copy, a delete, an upload and a finished pull leave behind, and what a name then means. Never knows when, or who asked.

What it keeps of the real one:
* A name that is there without all of its blobs is hollow: with its small layers it is still listed; `show` does not find it, and an
  inference with it is refused as by a model that can do nothing, for as long as the server runs (`poisoned`).
* A deleted or replaced model goes on in memory under the name and digest that it was loaded with (`runner_name`).

Invariants: two names that differ in letter case are one; a blob is removed only when no name has it.
"""

import hashlib
from collections.abc import Callable, Iterable
from typing import Final

import msgspec

from agent.simulated.answers import go_time
from agent.simulated.models import Knobs, Layer, SimulatedModel
from agent.simulated.names import MODELS_PATH, Parts, adopted, check_length, key_of, literal_name, parse_name, quoted, shown, split_source
from agent.simulated.reading import Refusal
from core.simulation.node import ModelTiming

DIGITS: Final = frozenset("0123456789abcdefABCDEF")
GGUF: Final = b"GGUF"
Key = tuple[str, ...]


class Blob(msgspec.Struct, frozen=True):
    """A file among the blobs."""

    size_bytes: int
    magic: bytes = GGUF  # its first four bytes


def blob_digest(spelling: str) -> str:
    """The digest that a path names, or `Refusal` (400)."""
    kind, hexadecimal = spelling[:7], spelling[7:]
    if kind not in ("sha256:", "sha256-") or len(hexadecimal) != 64 or not DIGITS.issuperset(hexadecimal):
        raise Refusal(400, "invalid digest format")
    return hexadecimal


def blob_path(digest: str) -> str:
    """Where a blob is said to lie."""
    return f"{MODELS_PATH}/blobs/sha256-{digest}"


class Library:
    """The models and blobs of one node."""

    def __init__(self, models: Iterable[SimulatedModel], knobs: Knobs, wall: Callable[[], int]) -> None:
        self.knobs = knobs
        self._wall = wall
        self.models: dict[Key, SimulatedModel] = {}
        self.timings: dict[str, ModelTiming] = {}  # by the name of the runner; what was once there stays
        self.blobs: dict[str, Blob] = {}
        self.partial: dict[str, int] = {}  # bytes that are there of blobs that are not whole
        self.poisoned: set[tuple[Key, str]] = set()
        self.used: set[tuple[Key, str]] = set()
        self._runners: dict[str, SimulatedModel] = {}
        for model in models:
            self.add(model)

    # -- names

    def find(self, spelling: str) -> SimulatedModel | None:
        """The model that `spelling` names. Raises `Refusal` for what is no name."""
        return self.at(parse_name(spelling))

    def at(self, parts: Parts) -> SimulatedModel | None:
        """The model of that name."""
        return self.models.get(key_of(parts))

    def for_inference(self, spelling: str) -> SimulatedModel | None:
        """As `find`, but a hollow model cannot do anything, and will not until a restart."""
        model = self.find(spelling)
        if model is None:
            return None
        key = (key_of(model.parts), model.hex_digest)
        if not self.whole(model):
            if not self.listed(model):
                return None
            if key in self.used:
                raise Refusal(404, f'model "{spelling}" not found, try pulling it first')
            self.poisoned.add(key)
        if key in self.poisoned:
            return msgspec.structs.replace(model, capabilities=())
        self.used.add(key)
        return model

    def display(self, spelling: str) -> str:
        """The name as lists would show it, in the letter case of what is there."""
        return shown(self._adopted(parse_name(spelling)))

    def _adopted(self, parts: Parts) -> Parts:
        return adopted(parts, [model.parts for model in self.models.values()])

    # -- what is whole

    def whole(self, model: SimulatedModel) -> bool:
        """Whether every blob of `model` is there."""
        return all(layer.digest in self.blobs for layer in model.all_layers)

    def listed(self, model: SimulatedModel) -> bool:
        """Whether its small blobs are there, which is all that lists ask."""
        return all(layer.digest in self.blobs for layer in model.all_layers[1:])

    def rows(self) -> list[SimulatedModel]:
        """The models that lists show, newest first, by the second."""
        there = [model for model in self.models.values() if self.listed(model)]
        return sorted(there, key=lambda model: model.modified_at[:19], reverse=True)

    # -- changes

    def add(self, model: SimulatedModel) -> SimulatedModel:
        """`model` and all its blobs are there, under its name as it is."""
        for layer in model.all_layers:
            self.blobs.setdefault(layer.digest, Blob(layer.size_bytes))
        self.models[key_of(model.parts)] = model
        self._name_runner(model)
        return model

    def write(self, parts: Parts, model: SimulatedModel) -> SimulatedModel:
        """`model` under another name, written now. Its blobs are not looked at."""
        check_length(parts, making=True)
        written = msgspec.structs.replace(
            model,
            name=shown(self._adopted(parts)),
            digest=model.hex_digest,
            weights=model.weights or model.hex_digest,
            layers=model.all_layers,
            modified_at=go_time(self._wall()),
        )
        self.models[key_of(parts)] = written
        self._name_runner(written)
        return written

    def _name_runner(self, model: SimulatedModel) -> None:
        name = self.runner_name(model)
        self.timings[name] = self.knobs.model_timing(model)
        self._runners[name] = model

    def runner_name(self, model: SimulatedModel) -> str:
        """What the machine calls `model`: its name, with the digest where the name once stood for another."""
        first = self._runners.get(model.name)
        if first is None or first.hex_digest == model.hex_digest:
            return model.name
        return f"{model.name}@{model.hex_digest[:12]}"

    def loaded_as(self, runner_name: str) -> SimulatedModel:
        """The model as it was when it was loaded."""
        return self._runners[runner_name]

    def copy(self, source: str, destination: str) -> None:
        """A second name for a model. Raises `Refusal`."""
        from_parts, to_parts = literal_name(source), literal_name(destination)
        if from_parts is None:
            raise Refusal(400, f"source {quoted(source)} is invalid")
        if to_parts is None:
            raise Refusal(400, f"destination {quoted(destination)} is invalid")
        check_length(from_parts)
        check_length(to_parts, making=True)
        if key_of(from_parts) == key_of(to_parts):
            return
        model = self.at(from_parts)
        if model is None:
            raise Refusal(404, f"model {quoted(source)} not found")
        if self.free_bytes() == 0:  # an empty file is left in its place
            self.models.pop(key_of(to_parts), None)
            path = f"{MODELS_PATH}/manifests/{'/'.join(to_parts)}"
            raise Refusal(500, f"write {path}: copy_file_range: no space left on device")
        self.write(to_parts, model)

    def delete(self, spelling: str) -> None:
        """The name goes, and with it the blobs that nothing else has. Raises `Refusal`."""
        if not spelling.strip():
            raise Refusal(400, "model is required")
        name, source = split_source(spelling)
        if source == "cloud":
            name += "-cloud" if ":" in name.rpartition("/")[2] else ":cloud"
        parts = literal_name(name)
        if parts is None:
            raise Refusal(400, f"name {quoted(spelling)} is invalid")
        check_length(parts)
        model = self.models.pop(key_of(parts), None)
        if model is None:
            raise Refusal(404, f"model '{spelling}' not found")
        self.drop(model.all_layers)

    def drop(self, layers: Iterable[Layer]) -> bool:
        """Remove those blobs that no model has. Whether there were any."""
        kept = {layer.digest for model in self.models.values() for layer in model.all_layers}
        gone = [layer.digest for layer in layers if layer.digest not in kept and layer.digest in self.blobs]
        for digest in gone:
            self.blobs.pop(digest, None)
        return bool(gone)

    def upload(self, expected: str, body: bytes) -> None:
        """A blob, kept under its own digest whatever was expected. Raises `Refusal`."""
        digest = hashlib.sha256(body).hexdigest()
        self.check_room(len(body))
        self.blobs.setdefault(digest, Blob(len(body), body[:4]))
        if digest != expected:
            raise Refusal(400, f'digest mismatch, expected "sha256:{expected}", got "sha256:{digest}"')

    def receive(self, layer: Layer) -> None:
        """A blob that came from a registry."""
        self.partial.pop(layer.digest, None)
        self.blobs[layer.digest] = Blob(layer.size_bytes)

    def free_bytes(self) -> int | None:
        """What is left of the disk, if it has an end."""
        if self.knobs.disk_bytes is None:
            return None
        return max(0, self.knobs.disk_bytes - sum(blob.size_bytes for blob in self.blobs.values()) - sum(self.partial.values()))

    def check_room(self, size_bytes: int) -> None:
        """Raises `Refusal` where so much does not fit."""
        free = self.free_bytes()
        if free is not None and size_bytes > free:
            raise Refusal(500, f"write {blob_path('1435121755')}: no space left on device", early=False)

    def restarted(self) -> None:
        """What only the running server knew is forgotten."""
        self.poisoned.clear()
        self.used.clear()
