"""The recorded conversations of group `sched`, and the same requests put to a simulated node.

Decides what is compared, not whether it is near enough. A tape holds what a client saw of a real Ollama on a small machine; `SCENES` adds
what the tape cannot show: what was loaded before, which prompts were known, and the traffic that was not recorded.
"""

import gzip
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import msgspec

from core.simulation.node import (
    Came,
    Finished,
    Left,
    ModelTiming,
    NodeEffect,
    NodeEvent,
    NodeTiming,
    Produced,
    Refused,
    RunnerChanged,
    SimulatedNode,
    UnloadAsked,
)
from core.units import Instant

FILE: Final = Path(__file__).parents[2] / "data" / "wire" / "sched.jsonl.gz"

# The machine of the recordings: two cores, no GPU. Fitted once, from the plain parts (docs/simulation.md, "How true it is").
DECODE_TOKENS_S: Final = 80.0
PREFILL_TOKENS_S: Final = 230.0
KNOWN_PROMPT_S: Final = 0.0145
"""A prompt that was read before: its last token is read again, a step as any other, and 2 ms pass between two requests on a slot."""
MODELS: Final = {
    "mid": ModelTiming(
        weights="mid", size_bytes=418_741_700, prefill_tokens_s=PREFILL_TOKENS_S, decode_tokens_s=DECODE_TOKENS_S,
        prompt_base_s=KNOWN_PROMPT_S - 1 / PREFILL_TOKENS_S, context_bytes=65_536, trained_context=8192,
    ),
    "tiny": ModelTiming(weights="tiny", size_bytes=679_809, prefill_tokens_s=20_000.0, decode_tokens_s=2000.0, trained_context=8192),
    "tiny2": ModelTiming(weights="tiny2", size_bytes=679_809, prefill_tokens_s=20_000.0, decode_tokens_s=2000.0, trained_context=8192),
}  # fmt: skip
MACHINE: Final = NodeTiming(load_base_s=0.255, load_bytes_s=418_741_700 / 0.255, unload_s=0.05, contention=5.0)
START_S: Final = 10.0
"""On the node's clock, when a tape begins; what was before it happens before."""


class Scene(msgspec.Struct, frozen=True, kw_only=True):
    """What a tape does not show. `known`: prompts that the runner has read before. `traffic`: requests of the unrecorded clients."""

    warm: str = ""
    num_ctx: int | None = None
    known: tuple[str, ...] = ()
    traffic: tuple[tuple[float, Came], ...] = ()
    batch_tokens: int = 512
    pace: float = 1.0
    """What the recorder left of the machine when it asked for `/api/ps` without a pause: from the speed of the tape's first stream."""
    loads: tuple[str, ...] = ()
    """The loads that followed, in order, as the tape's `load_duration`s tell."""


def _traffic(keep_alive_s: float | None) -> tuple[tuple[float, Came], ...]:
    """Two clients, seven requests each, one after the other, from half a second before the tape begins until about 12 s."""
    return tuple(
        (
            -0.5 + client * 0.1 + turn * 1.754,
            Came(
                request_id=f"{client}/{turn}", model="mid", prompt_tokens=17, output_tokens=105, conversation="t", keep_alive_s=keep_alive_s
            ),
        )
        for turn in range(7)
        for client in range(2)
    )


SCENES: Final = {
    "cancel-decode": Scene(warm="mid"),
    "cancel-decode-whole": Scene(warm="mid", known=("zz",)),
    "cancel-load": Scene(loads=("mid aborted", "mid")),
    "cancel-load-alone": Scene(loads=("mid aborted",)),
    "cancel-prefill": Scene(warm="mid", known=("zz",)),
    "cancel-prefill-whole": Scene(warm="mid", known=("zz",)),
    "cancel-queued": Scene(warm="mid"),
    "eviction-starved-5m": Scene(warm="mid", known=("t",), traffic=_traffic(300.0)),
    "eviction-starved-no-keep-alive": Scene(warm="mid", known=("t",), traffic=_traffic(None), loads=("tiny",)),
    "eviction-waits": Scene(warm="mid", pace=0.70, loads=("tiny", "tiny2")),
    "expires-while-busy": Scene(pace=0.77, loads=("mid",)),
    "keep-alive-sticks": Scene(loads=("tiny",)),
    "load-and-ps": Scene(loads=("mid",)),
    "num-ctx-thrash": Scene(loads=("mid",) * 6),
    "num-ctx-while-busy": Scene(warm="mid", num_ctx=2048, loads=("mid", "mid", "tiny")),
    "one-slot": Scene(warm="mid"),
    "prefill-stalls-decode": Scene(warm="mid", batch_tokens=1024),
    "queue-full": Scene(loads=("mid",)),
    "queue-full-v1-chat-completions": Scene(loads=("mid",)),
    "queue-full-v1-messages": Scene(loads=("mid",)),
    "queue-not-for-hot": Scene(warm="mid", known=("x",)),
    "unload-busy": Scene(warm="mid", pace=0.87),
}


class Asked(msgspec.Struct, kw_only=True):
    """One request and what became of it. Seconds since the tape's beginning; None: it did not happen."""

    name: str
    event: NodeEvent
    at_s: float
    stream: bool = True
    leaves_s: float | None = None
    refused: bool = False
    first_s: float | None = None
    """The first byte of the answer."""
    end_s: float | None = None
    obtained_s: float | None = None
    """From its arrival until a runner was ready for it, as the node says."""

    @property
    def outcome(self) -> str:
        """refused, served, left or waiting."""
        return "refused" if self.refused else "left" if self.leaves_s is not None else "served" if self.end_s is not None else "waiting"


class Tape(msgspec.Struct, kw_only=True):
    """A recorded conversation."""

    case: str
    asked: list[Asked]
    notes: list[tuple[float, str]]
    span_s: float
    timing: NodeTiming
    scene: Scene


class Run(msgspec.Struct, kw_only=True):
    """The same, simulated. `produced`: (time, request, tokens so far)."""

    asked: list[Asked]
    changes: list[RunnerChanged]
    produced: list[tuple[float, str, int]]
    shown: list[dict[str, float]]
    """What `/api/ps` would have said at each note: when each model expires."""


def tapes() -> list[Tape]:
    """All of them."""
    with gzip.open(FILE, "rt", encoding="utf-8") as lines:
        return [_tape(json.loads(line)) for line in lines]


def _tape(told: dict[str, Any]) -> Tape:
    case = told["case"].removeprefix("sched/")
    scene = SCENES[case]
    settings = dict(re.findall(r"OLLAMA_(\w+)=(\d+)", told["server"]))
    names = {"NUM_PARALLEL": "slots", "MAX_QUEUE": "max_queue", "MAX_LOADED_MODELS": "max_loaded"}
    timing = msgspec.structs.replace(
        MACHINE, batch_tokens=scene.batch_tokens, **{names[key]: int(value) for key, value in settings.items()}
    )
    asked: dict[str, Asked] = {}
    serial: dict[str, int] = {}
    notes = []
    for event in told["events"]:
        at_s, conn = event["ms"] / 1000, event["conn"]
        if event["do"] == "note":
            notes.append((at_s, str(event.get("text") or event.get("note") or event.get("raw"))))
        elif event["do"] == "open":
            serial[conn] = serial.get(conn, 0) + 1
        elif event["do"] == "send":
            name = conn if serial[conn] == 1 else f"{conn}'{serial[conn]}"
            asked[conn] = asked[f"{conn}/{serial[conn]}"] = _asked(name, at_s, event["raw"])
        elif event["do"] == "close":
            asked[conn].leaves_s = at_s
        elif event["do"] == "recv":
            _received(asked[conn], at_s, event["raw"])
    every = [one for key, one in asked.items() if "/" in key]
    return Tape(case=case, asked=every, notes=notes, span_s=told["events"][-1]["ms"] / 1000, timing=timing, scene=scene)


def _asked(name: str, at_s: float, raw: str) -> Asked:
    _, _, text = raw.partition("\r\n\r\n")
    body = json.loads(text)
    options = body.get("options", {})
    prompt = body["messages"][0]["content"] if "messages" in body else body.get("prompt", "")
    if not prompt and body.get("keep_alive") == 0:
        return Asked(name=name, at_s=at_s, event=UnloadAsked(body["model"]), stream=False)
    return Asked(
        name=name,
        at_s=at_s,
        stream=body.get("stream", True),
        event=Came(
            request_id=name,
            model=body["model"],
            prompt_tokens=len(prompt) + 2,  # these models know letters only
            output_tokens=options.get("num_predict") or body["max_tokens"],
            num_ctx=options.get("num_ctx"),
            keep_alive_s=_seconds(body.get("keep_alive")),
            conversation=prompt,
            paced=body.get("stream", True),
        ),
    )


def _seconds(keep_alive: float | str | None) -> float | None:
    if isinstance(keep_alive, str):
        return float(keep_alive[:-1]) * {"s": 1, "m": 60}[keep_alive[-1]]
    return keep_alive


def _received(asked: Asked, at_s: float, raw: str) -> None:
    if asked.first_s is None:
        asked.first_s = at_s
        asked.refused = " 503 " in raw.partition("\r\n")[0]
    asked.end_s = at_s
    if (found := re.search(r'"load_duration":(\d+)', raw)) is not None:
        asked.obtained_s = int(found[1]) / 1e9


def replay(tape: Tape) -> Run:
    """The tape's requests, at their times, put to a simulated node of its machine."""
    player = _Player(tape)
    player.play()
    return Run(asked=player.asked, changes=player.changes, produced=player.produced, shown=player.shown)


def _models(pace: float) -> dict[str, ModelTiming]:
    return {
        name: msgspec.structs.replace(
            model,
            prefill_tokens_s=model.prefill_tokens_s * pace,
            decode_tokens_s=model.decode_tokens_s * pace,
            prompt_base_s=model.prompt_base_s / pace,
        )
        for name, model in MODELS.items()
    }


class _Player:
    def __init__(self, tape: Tape) -> None:
        self._tape = tape
        self._node = SimulatedNode(tape.timing, _models(tape.scene.pace), now=Instant(0.0))
        self.asked = [Asked(name=one.name, event=one.event, at_s=one.at_s, stream=one.stream, leaves_s=one.leaves_s) for one in tape.asked]
        self._by_name = {one.name: one for one in self.asked}
        self.changes: list[RunnerChanged] = []
        self.produced: list[tuple[float, str, int]] = []
        self.shown: list[dict[str, float]] = []

    def play(self) -> None:
        scene = self._tape.scene
        acts: list[tuple[float, int, NodeEvent | None]] = []
        if scene.warm:
            acts.append((-START_S, -2, Came(request_id="warm", model=scene.warm, num_ctx=scene.num_ctx)))
            for prompt in scene.known:
                tokens = len(prompt) + 2 if prompt != "t" else 17
                known = Came(request_id=f"known {prompt}", model=scene.warm, prompt_tokens=tokens, output_tokens=1, conversation=prompt)
                acts.append((-START_S + 2, -1, known))
        acts += [(at_s, -1, came) for at_s, came in scene.traffic]
        for place, one in enumerate(self.asked):
            acts.append((one.at_s, place, one.event))
            if one.leaves_s is not None:
                acts.append((one.leaves_s, place, Left(one.name)))
        acts += [(at_s, 1 << 20, None) for at_s, _ in self._tape.notes]
        for at_s, _, event in sorted(acts, key=lambda act: act[:2]):
            self._until(at_s)
            now = Instant(START_S + at_s)
            if event is None:
                self.shown.append({row.model: row.expires_at - START_S for row in self._node.loaded(now=now)})
            else:
                self._heard(self._node.handle(event, now=now), at_s)
                if isinstance(event, UnloadAsked):
                    one = next(one for one in self.asked if one.event is event)
                    one.first_s = one.end_s = at_s
        self._until(self._tape.span_s * 1.5)

    def _until(self, at_s: float) -> None:
        while (due := self._node.next_deadline()) is not None and due <= START_S + at_s:
            self._heard(self._node.tick(now=due), due - START_S)

    def _heard(self, effects: list[NodeEffect], at_s: float) -> None:
        for effect in effects:
            if isinstance(effect, RunnerChanged):
                self.changes.append(effect)
                continue
            one = self._by_name.get(effect.request_id)
            if one is None:
                continue
            match effect:
                case Refused():
                    one.refused, one.first_s, one.end_s = True, at_s, at_s
                case Produced(tokens=tokens):
                    self.produced.append((at_s, one.name, tokens))
                    if one.first_s is None and one.stream:
                        one.first_s = at_s
                case Finished(timing=timing):
                    one.first_s = at_s if one.first_s is None else one.first_s
                    one.end_s, one.obtained_s = at_s, timing.obtained - timing.came
                case _:
                    raise AssertionError(f"{one.name}: {effect}")


# ------------------------------------------------------------ comparing

NEAR: Final = 0.15
FLOOR_S: Final = 0.015
"""A difference of so much is none: little more than the step of one token, on a machine that also ran the client."""
PING_S: Final = 0.05
"""Getting a runner that is ready takes less, here nothing: its health is asked, and twelve at once wait for that 16 ms."""
TOGETHER_S: Final = 0.01
"""Equal requests that came within so much of each other are interchangeable: which of them is served first is chance."""


def agrees(real_s: float, ours_s: float) -> bool:
    """Near enough."""
    return abs(ours_s - real_s) <= max(NEAR * real_s, FLOOR_S)


def matched(tape: Tape, run: Run) -> Iterator[tuple[Asked, Asked]]:
    """Each recorded request with its simulated one; interchangeable ones in the order in which they ended, the refused first."""
    groups: list[list[int]] = []
    for place, one in enumerate(tape.asked):
        previous = tape.asked[groups[-1][-1]] if groups else None
        if previous is not None and one.at_s - previous.at_s < TOGETHER_S and _alike(one.event, previous.event):
            groups[-1].append(place)
        else:
            groups.append([place])

    def rank(one: Asked) -> tuple[bool, float]:
        return (not one.refused, one.end_s if one.end_s is not None else float("inf"))

    for group in groups:
        real = sorted((tape.asked[place] for place in group), key=rank)
        ours = sorted((run.asked[place] for place in group), key=rank)
        yield from zip(real, ours, strict=True)


def _alike(one: NodeEvent, other: NodeEvent) -> bool:
    if not isinstance(one, Came) or not isinstance(other, Came):
        return False
    return msgspec.structs.replace(one, request_id="") == msgspec.structs.replace(other, request_id="")


def figures(real: Asked, ours: Asked) -> dict[str, tuple[float | None, float | None]]:
    """What can be compared of a request: seconds in reality and here, from its sending on."""
    out: dict[str, tuple[float | None, float | None]] = {}
    if real.first_s is not None:
        out["first byte"] = (real.first_s - real.at_s, None if ours.first_s is None else ours.first_s - ours.at_s)
    if real.outcome != "left" and real.end_s is not None:
        out["end"] = (real.end_s - real.at_s, None if ours.end_s is None else ours.end_s - ours.at_s)
    if real.obtained_s is not None and max(real.obtained_s, ours.obtained_s or 0) > PING_S:
        out["runner"] = (real.obtained_s, ours.obtained_s)
    return out


def disorder(tape: Tape, run: Run) -> list[tuple[str, str]]:
    """Pairs of events that came in one order in reality, further apart than `FLOOR_S`, and in the other one here."""
    events = []
    for real, ours in matched(tape, run):
        for what, (before, after) in {"first": (real.first_s, ours.first_s), "end": (real.end_s, ours.end_s)}.items():
            if before is not None and after is not None:
                events.append((before, after, f"{real.name} {what}"))
    events.sort()
    return [
        (earlier[2], later[2])
        for place, earlier in enumerate(events)
        for later in events[place + 1 :]
        if later[0] - earlier[0] > FLOOR_S and later[1] < earlier[1]
    ]
