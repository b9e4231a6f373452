"""Pulls and pushes of a simulated node: their lines, in their time.

Decides what a client is told about a transfer, and when; what is left on disk is the library's, what there is to be had the registry's.

Invariants: a blob is fetched once however many ask for it, each on its own clock; what was fetched when the last of them leaves is kept
for the next; the name is written last, so an unfinished pull is never listed.
"""

from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any, Final

import trio

from agent.simulated.library import Library, blob_path
from agent.simulated.models import Layer, SimulatedModel
from agent.simulated.names import DEFAULT_HOST, MODELS_PATH, Parts, full, literal_name, loose_parts, parse_name
from agent.simulated.reading import Refusal
from agent.simulated.registry import Pause, Registry

TICK_S: Final = 0.06
"""Between two lines about a layer."""
Line = dict[str, Any]
Lines = AsyncGenerator[Line, None]


class Download:
    """A blob on its way. How much of it is there follows from the time alone."""

    def __init__(self, layer: Layer, kept_bytes: int, room_bytes: int, bytes_s: float, pause: Pause | None, now: float) -> None:
        self.layer = layer
        self.room_bytes = room_bytes  # so much of it fits on the disk
        self.watchers = 0
        self._kept = kept_bytes
        self._rate = max(1.0, bytes_s)
        self._pause = pause if pause is not None and kept_bytes <= pause.at_bytes < room_bytes else None
        self._began = now

    def completed(self, now: float) -> int:
        """Bytes that are there."""
        size, elapsed = self.room_bytes, now - self._began
        if (pause := self._pause) is not None:
            until = (pause.at_bytes - self._kept) / self._rate
            if elapsed >= until:
                after = elapsed - until - pause.seconds
                return pause.at_bytes if after < 0 else min(size, pause.resumes_at_bytes + int(after * self._rate))
        return min(size, self._kept + int(elapsed * self._rate))

    def done_at(self) -> float:
        """When all of it is there."""
        left = (self.room_bytes - self._kept) / self._rate
        if (pause := self._pause) is not None:
            left += pause.seconds + (pause.at_bytes - pause.resumes_at_bytes) / self._rate
        return self._began + left


def layer_line(verb: str, layer: Layer, completed: int) -> Line:
    """A line about a layer; what is 0 is left out."""
    line: Line = {"status": f"{verb} {layer.digest[:12]}", "digest": f"sha256:{layer.digest}"}
    numbers = {"total": layer.size_bytes, "completed": completed}
    return line | {name: number for name, number in numbers.items() if number}


class Transfers:
    """The transfers of one node."""

    def __init__(self, library: Library, registry: Registry) -> None:
        self._library = library
        self.registry = registry
        self._running: dict[str, Download] = {}

    # -- pull

    async def pull(self, spelling: str, *, insecure: bool = False) -> Lines:
        """The lines of a pull. Raises `Refusal`: before the first line for a bad name, else as its last line."""
        parts = parse_name(spelling)
        yield {"status": "pulling manifest"}
        if (failure := self.registry.failing("slow", parts)) is not None:
            await trio.sleep(failure.seconds)
        model = self.registry.manifest(parts, insecure=insecure)
        fetched: list[Layer] = []
        for layer in model.all_layers:
            if layer.digest in self._library.blobs:
                yield layer_line("pulling", layer, layer.size_bytes)
                continue
            async with aclosing(self._fetch(parts, layer)) as lines:
                async for line in lines:
                    yield line
            fetched.append(layer)
        yield {"status": "verifying sha256 digest"}
        await trio.sleep(sum(layer.size_bytes for layer in fetched) / self._library.knobs.hash_bytes_s)
        if fetched and self.registry.failing("corrupt", parts) is not None:
            self._library.blobs.pop(fetched[0].digest, None)
            wrong = fetched[0].digest[::-1]
            raise Refusal(500, f"digest mismatch, file must be downloaded again: want sha256:{fetched[0].digest}, got sha256:{wrong}")
        yield {"status": "writing manifest"}
        if self._written(parts, model):
            yield {"status": "removing unused layers"}
        yield {"status": "success"}

    def _written(self, parts: Parts, model: SimulatedModel) -> bool:
        """Write the name. Whether layers of what it stood for before were removed."""
        before = self._library.at(parts)
        self._library.write(parts, model)
        return before is not None and not self._library.knobs.noprune and self._library.drop(before.all_layers)

    async def _fetch(self, parts: Parts, layer: Layer) -> Lines:
        if (failure := self.registry.failing("blob", parts)) is not None:
            until = trio.current_time() + failure.seconds
            while (left := until - trio.current_time()) > 0:
                await trio.sleep(min(TICK_S, left))
                yield layer_line("pulling", layer, 0)
            raise Refusal(500, failure.text)
        download = self._join(parts, layer)
        try:
            while (left := download.done_at() - trio.current_time()) > 0:
                await trio.sleep(min(TICK_S, left))
                if left > TICK_S:
                    yield layer_line("pulling", layer, download.completed(trio.current_time()))
            if download.room_bytes < layer.size_bytes:
                raise Refusal(500, f"write {blob_path(layer.digest)}-partial: no space left on device")
            self._library.receive(layer)
        finally:
            self._leave(download)

    def _join(self, parts: Parts, layer: Layer) -> Download:
        download = self._running.get(layer.digest)
        if download is None:
            kept = self._library.partial.get(layer.digest, 0)
            free = self._library.free_bytes()
            room = layer.size_bytes if free is None else min(layer.size_bytes, kept + free)
            pause = self.registry.pause(parts, kept)
            download = Download(layer, kept, room, self.registry.bytes_s, pause, trio.current_time())
            self._running[layer.digest] = download
        download.watchers += 1
        return download

    def _leave(self, download: Download) -> None:
        download.watchers -= 1
        if download.watchers:
            return
        digest = download.layer.digest
        self._running.pop(digest, None)
        if digest not in self._library.blobs:
            self._library.partial[digest] = download.completed(trio.current_time())

    # -- push

    async def push(self, spelling: str, *, insecure: bool = False) -> Lines:
        """The lines of a push. Raises `Refusal` as its last line."""
        yield {"status": "retrieving manifest"}
        parts = literal_name(spelling)
        model = None if parts is None else self._library.at(parts)
        if parts is None or model is None:
            yield {"status": "couldn't retrieve manifest"}
            raise Refusal(500, _unknown(spelling, parts))
        if parts[0] != DEFAULT_HOST and not insecure:
            address = f"https://{parts[0]}/v2/{parts[1]}/{parts[2]}/blobs/sha256:{model.all_layers[0].digest}"
            raise Refusal(500, f'Head "{address}": tls: first record does not look like a TLS handshake')
        if (failure := self.registry.failing("upload", parts)) is not None:
            await trio.sleep(failure.seconds)
            raise Refusal(500, failure.text)
        there = self.registry.blobs()
        for layer in model.all_layers:
            if layer.digest in there:
                yield layer_line("pushing", layer, layer.size_bytes)
                continue
            began, left = trio.current_time(), layer.size_bytes / self.registry.bytes_s
            while left > 0:
                await trio.sleep(min(TICK_S, left))
                left = began + layer.size_bytes / self.registry.bytes_s - trio.current_time()
                yield layer_line("pushing", layer, layer.size_bytes)
        yield {"status": "pushing manifest"}
        if (failure := self.registry.failing("publish", parts)) is not None:
            raise Refusal(500, failure.text)
        self.registry.publish(model)
        yield {"status": "success"}


def _unknown(spelling: str, parts: Parts | None) -> str:
    if parts is None:
        return f"unqualified name: {full(loose_parts(spelling))}"
    return f"open {MODELS_PATH}/manifests/{'/'.join(parts)}: no such file or directory"
