"""Pulls of one model on several nodes, told as the one pull that Ollama's clients know (`ollama-wire.md` 6.1).

Decides which lines a client gets. A layer is as far as on the slowest node that still works, so a bar is full when every node has it.
Never knows where lines go. Invariants: what is shown of a layer never goes back; `success` is said only when every task succeeded, and is
the last line, as an error is, which names each node that failed.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

from core.tasks import FINISHED, TaskState, TaskView, failures
from core.transfer import Layer, farther
from core.units import AgentId

Line = dict[str, Any]

_STAGES: Final = ("pulling", "verifying sha256 digest", "writing manifest")
_LATER: Final = ("verifying", "writing", "removing", "success")


class MergedPull:
    """What one client has been told."""

    def __init__(self, names: Mapping[AgentId, str]) -> None:
        """`names`: what the nodes are called."""
        self._names = names
        self._told: dict[str, Layer] = {}
        self._stage = -1

    def lines(self, tasks: Sequence[TaskView]) -> list[Line]:
        """What to say now, given how the tasks stand."""
        said: list[Line] = []
        if self._stage < 0:
            self._stage = 0
            said.append({"status": "pulling manifest"})
        working = [task for task in tasks if task.status not in FINISHED]
        if self._stage == 0:
            said += self._layers(tasks, working)
        reached = min((_stage(task) for task in working), default=0)
        said += self._until(reached)
        return said

    def last(self, tasks: Sequence[TaskView]) -> list[Line]:
        """What to say when all tasks are finished: the rest, and how it ended."""
        if wrong := failures(tasks, self._names):
            return [{"error": wrong}]
        return [*self.lines(tasks), *self._until(len(_STAGES) - 1), {"status": "success"}]

    def _until(self, stage: int) -> Iterator[Line]:
        while self._stage < stage:
            self._stage += 1
            yield {"status": _STAGES[self._stage]}

    def _layers(self, tasks: Sequence[TaskView], working: Sequence[TaskView]) -> Iterator[Line]:
        order = list(dict.fromkeys(layer.digest for task in tasks for layer in task.layers))
        place = {digest: number for number, digest in enumerate(order)}
        nodes = [({layer.digest: layer for layer in task.layers}, _stage(task) > 0) for task in working]
        if not nodes:
            nodes = [({layer.digest: layer for layer in task.layers}, True) for task in tasks if task.status is TaskState.COMPLETED]
        for digest in order:
            total = max(layer.total for task in tasks for layer in task.layers if layer.digest == digest)
            done = [total if past else _completed(layers, digest, total, place) for layers, past in nodes]
            known = self._told.get(digest)
            told = farther(known, Layer(digest, total, min(done, default=0)))
            if told != known:
                self._told[digest] = told
                yield _line(told)


def _completed(layers: Mapping[str, Layer], digest: str, total: int, place: Mapping[str, int]) -> int:
    """How far a node is with a layer; one that has gone on to a later layer has it, said or not."""
    if any(place[other] > place[digest] for other in layers):
        return total
    layer = layers.get(digest)
    return layer.completed if layer is not None else 0


def _stage(task: TaskView) -> int:
    if task.phase.startswith("verifying"):
        return 1
    return 2 if task.phase.startswith(_LATER) else 0


def _line(layer: Layer) -> Line:
    """As Ollama writes it: `completed` is left out while it is 0, and both when the layer is empty."""
    line: Line = {"status": f"pulling {layer.digest.removeprefix('sha256:')[:12]}", "digest": layer.digest}
    if layer.total:
        line["total"] = layer.total
    if layer.completed:
        line["completed"] = layer.completed
    return line
