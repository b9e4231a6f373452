"""Requests as they come: rows of a public trace, or of one's own history, with a model drawn for each.

Decides nothing about routing. Reads no files: rows come in as iterables. No public trace names a model, so models are drawn from a mix,
by the seed; the mix is part of every figure made with it. A conversation stays with its model. Invariant: same rows, mix and seed, same
requests.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Final
from zlib import crc32

import msgspec

from core.affinity import BYTES_PER_TOKEN, FIRST_BYTES
from core.simulation.prng import Prng


class Row(msgspec.Struct, frozen=True, kw_only=True):
    """A request of a trace. `blocks`: ids of its prompt's prefix blocks of `block_tokens` each, when the trace has them."""

    at_s: float
    input_tokens: int
    output_tokens: int
    kind: str = ""
    blocks: tuple[int, ...] = ()
    block_tokens: int = 0
    output_limit: int | None = None
    """What the request allowed (`num_predict`, `max_tokens`), when the trace tells."""


class Arrival(msgspec.Struct, frozen=True, kw_only=True):
    """A request of the simulated world."""

    at_s: float
    model: str
    input_tokens: int
    output_tokens: int
    client: str = ""
    conversation: str = ""
    shared_tokens: int | None = None
    """How much of its prompt is that of the last request of its conversation; None: it has none."""
    prefixes: tuple[int, ...] = ()
    """What an edge tells of how the prompt begins (`core.affinity`)."""
    output_limit: int | None = None
    """What the router is told of it; the answer has `output_tokens` either way."""


CONVERSATION_MIX: Final[Mapping[str, int]] = {
    "llama3.1:8b": 38, "llama3.2:3b": 22, "gemma2:9b": 10, "gemma3:12b": 9, "qwen2.5:14b": 9, "qwen2.5:32b": 9, "llama3.1:70b": 3,
}  # fmt: skip
CODE_MIX: Final[Mapping[str, int]] = {"qwen2.5-coder:7b": 70, "qwen2.5:14b": 15, "qwen2.5:32b": 15}
INPUT_MAX: Final = 3584
"""Longer prompts are cut: what fits into a context of 4,096 with an answer."""


def azure_rows(lines: Iterable[str], *, kind: str) -> Iterator[Row]:
    """Rows of an Azure 2023 trace (`TIMESTAMP,ContextTokens,GeneratedTokens`), seconds since midnight of its first day.

    Raises:
        ValueError: a line that is not of that form.
    """
    for line in lines:
        if line.startswith("TIMESTAMP") or not line.strip():
            continue
        stamp, context, generated = line.strip().split(",")
        hours, minutes, seconds = stamp.partition(" ")[2].split(":")
        at_s = int(hours) * 3600 + int(minutes) * 60 + float(seconds)
        yield Row(at_s=at_s, input_tokens=int(context), output_tokens=max(1, int(generated)), kind=kind)


PREFIX_MAX_TOKENS: Final = 16_384
"""An edge looks at no more of a prompt's beginning."""
MOONCAKE_BLOCK: Final = 512
"""Tokens of a prefix block."""


class _Mooncake(msgspec.Struct):
    timestamp: int
    input_length: int
    output_length: int
    hash_ids: tuple[int, ...] = ()


def mooncake_rows(lines: Iterable[str], *, scale: int = 8) -> Iterator[Row]:
    """Rows of a Mooncake trace, lengths divided by `scale` (its prompts are data-centre long).

    Raises:
        msgspec.ValidationError: a line that is not of that form.
    """
    for line in lines:
        if line.strip():
            row = msgspec.json.decode(line, type=_Mooncake)
            yield Row(
                at_s=row.timestamp / 1000,
                input_tokens=max(1, row.input_length // scale),
                output_tokens=max(1, row.output_length // scale),
                kind="conversation",
                blocks=row.hash_ids,
                block_tokens=MOONCAKE_BLOCK // scale,
            )


def arrivals(
    rows: Iterable[Row],
    *,
    rate_per_s: float,
    mixes: Mapping[str, Mapping[str, int]],
    prng: Prng,
    poisson: bool = False,
    jitter_s: float = 0.0,
    clients: int = 50,
) -> list[Arrival]:
    """The rows as requests at `rate_per_s` on average: the trace's own rhythm stretched, or a Poisson process with the rows' lengths."""
    jitter, models, gaps, who = (prng.split(name) for name in ("jitter", "models", "gaps", "clients"))
    ordered = sorted((row.at_s + (jitter.uniform_s(0.0, jitter_s) if jitter_s else 0.0), index, row) for index, row in enumerate(rows))
    if not ordered:
        return []
    start, span = ordered[0][0], max(ordered[-1][0] - ordered[0][0], 1e-9)
    stretch = (len(ordered) / rate_per_s) / span
    drawn: dict[str, tuple[Sequence[str], Sequence[int]]] = {kind: (list(mix), list(mix.values())) for kind, mix in mixes.items()}
    out: list[Arrival] = []
    last: dict[int, tuple[str, tuple[int, ...]]] = {}
    """Of each conversation: its model, and the blocks of its last prompt."""
    clock = 0.0
    for at_s, _, row in ordered:
        clock = clock + gaps.exponential_s(1.0 / rate_per_s) if poisson else (at_s - start) * stretch
        names, weights = drawn[row.kind]
        model = names[models.weighted(weights)]
        conversation, shared = "", None
        if len(row.blocks) > 1:
            # Prompts with one second block belong together; the first is the system prompt of everybody (traces' README).
            model, before = last.get(row.blocks[1], (model, ()))
            last[row.blocks[1]] = (model, row.blocks)
            conversation, shared = f"{model}/{row.blocks[1]}", _shared(row, before)
        out.append(
            Arrival(
                at_s=clock,
                model=model,
                input_tokens=min(row.input_tokens, INPUT_MAX),
                output_tokens=row.output_tokens,
                client=f"client-{who.below(clients)}",
                conversation=conversation,
                shared_tokens=shared,
                prefixes=_prefixes(row),
                output_limit=row.output_limit,
            )
        )
    return out


def _prefixes(row: Row) -> tuple[int, ...]:
    """Checksums of its blocks up to each length that an edge would tell."""
    found: list[int] = []
    length = FIRST_BYTES // BYTES_PER_TOKEN
    while row.block_tokens and length <= min(len(row.blocks) * row.block_tokens, PREFIX_MAX_TOKENS):
        found.append(crc32(repr(row.blocks[: length // row.block_tokens]).encode()))
        length *= 2
    return tuple(found)


def _shared(row: Row, before: tuple[int, ...]) -> int:
    """Tokens of the blocks that both prompts begin with."""
    count = 0
    for ours, theirs in zip(row.blocks, before, strict=False):
        if ours != theirs:
            break
        count += 1
    return count * row.block_tokens
