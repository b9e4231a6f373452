"""The registry that simulated nodes pull from and push to.

Decides what is published under which name, how fast its bytes come, and how it can be told to fail. One registry may serve many nodes;
it never knows which. What was published anew under a name is found by the next pull: so digests drift.
"""

from collections.abc import Iterable
from typing import Final, Literal, NamedTuple

import msgspec

from agent.simulated.models import KNOWN, SimulatedModel, guessed_model
from agent.simulated.names import DEFAULT_HOST, Parts, key_of, literal_name
from agent.simulated.reading import Refusal

RETRY_S: Final = 1.0
"""How long after a cut a download goes on."""
STALL_S: Final = 31.0
"""After so long without a byte a part is asked for again, from its start."""
FailureKind = Literal["manifest", "slow", "blob", "cut", "stall", "corrupt", "upload", "publish"]


class Failure(msgspec.Struct, frozen=True, kw_only=True):
    """One way in which the registry fails, and how often. What a client is told is `text`; Ollama's own are in `tests/data/wire`.

    | kind | what happens |
    | --- | --- |
    | `manifest` | a pull ends with `pull model manifest: ` and `text` |
    | `slow` | a manifest takes `seconds` |
    | `blob` | a blob cannot be had: `text` after `seconds` (`file does not exist`; `context deadline exceeded` after 30) |
    | `cut` | the bytes end after `after_bytes`, and go on a second later |
    | `stall` | after `after_bytes` nothing for `seconds`; over 30 s the part starts again from its beginning |
    | `corrupt` | the bytes are others, which is found out at the end |
    | `upload` | a push ends with `text` before the first blob, after `seconds` |
    | `publish` | a push ends with `text` after the last |
    """

    kind: FailureKind
    model: str | None = None  # as it is published; None: any
    times: int | None = None  # so often; None: until it is cleared
    text: str = "500: internal"
    seconds: float = 0.0
    after_bytes: int = 0


class Pause(NamedTuple):
    """Where a download stands still, for how long, and from where it goes on."""

    at_bytes: int
    seconds: float
    resumes_at_bytes: int


class Registry:
    """What can be pulled. Without `models` it has those that a demo knows. On the hosts in `closed` nobody listens."""

    def __init__(self, models: Iterable[SimulatedModel | str] | None = None, *, bytes_s: float = 400e6, closed: Iterable[str] = ()) -> None:
        self.bytes_s = bytes_s
        self._closed = frozenset(closed)
        self._published: dict[tuple[str, ...], SimulatedModel] = {}
        self._failures: list[Failure] = []
        self._fired: list[int] = []
        for model in KNOWN if models is None else models:
            self.publish(guessed_model(model) if isinstance(model, str) else model)

    def publish(self, model: SimulatedModel) -> None:
        """`model` is what its name stands for from now on, on every host."""
        self._published[key_of(model.parts)[1:]] = model

    def fail(self, failure: Failure) -> None:
        """From the next request on."""
        self._failures.append(failure)
        self._fired.append(0)

    def recover(self) -> None:
        """It works again."""
        self._failures, self._fired = [], []

    def failing(self, kind: FailureKind, parts: Parts) -> Failure | None:
        """The failure of that kind that is due, if any."""
        for at, failure in enumerate(self._failures):
            if failure.kind != kind or (failure.times is not None and self._fired[at] >= failure.times):
                continue
            named = literal_name(failure.model) if failure.model is not None else None
            if named is not None and key_of(named)[1:] != key_of(parts)[1:]:
                continue
            self._fired[at] += 1
            return failure
        return None

    def manifest(self, parts: Parts, *, insecure: bool) -> SimulatedModel:
        """What is published under a name. Raises `Refusal` in a pull's words."""
        host = parts[0]
        path = f"v2/{parts[1]}/{parts[2]}/manifests/{parts[3]}"
        if host in self._closed:
            address = f"{'http' if insecure else 'https'}://{host}/{path}"
            raise Refusal(500, f'pull model manifest: Get "{address}": dial tcp {host}: connect: connection refused')
        if host != DEFAULT_HOST and not insecure:
            raise Refusal(500, f'pull model manifest: Get "https://{host}/{path}": tls: first record does not look like a TLS handshake')
        failure = self.failing("manifest", parts)
        if failure is not None:
            raise Refusal(500, f"pull model manifest: {failure.text}")
        model = self._published.get(key_of(parts)[1:])
        if model is None:
            raise Refusal(500, "pull model manifest: file does not exist")
        return model

    def blobs(self) -> set[str]:
        """The digests that it has."""
        return {layer.digest for model in self._published.values() for layer in model.all_layers}

    def pause(self, parts: Parts, kept_bytes: int) -> Pause | None:
        """Where the download of a blob of which so much is there stands still."""
        if (failure := self.failing("cut", parts)) is not None:
            return Pause(failure.after_bytes, RETRY_S, failure.after_bytes)
        if (failure := self.failing("stall", parts)) is not None:
            again = failure.seconds >= STALL_S - 1
            return Pause(failure.after_bytes, STALL_S if again else failure.seconds, kept_bytes if again else failure.after_bytes)
        return None
