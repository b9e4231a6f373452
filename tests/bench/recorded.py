"""What a recorded request takes of the coordinator's process and of the process that writes, in microseconds of processor time.

    python -m tests.bench.recorded [--seconds 4]

Small answers over 32 connections at full load; what the system accounts to each process, divided by the records that were written.
"""

import argparse
import tempfile
from pathlib import Path

from tests.bench.children import cpu_s, descendants, more_files
from tests.bench.programs import SMALL, wrk
from tests.bench.sides import EMBEDDED_ON, stage

RECORDS = "ollama_router_history_records_total"


def measure(place: Path, *, seconds: int) -> tuple[float, float, float]:
    """Records that were written, and the microseconds of each that the coordinator and its children took."""
    with stage(place, [EMBEDDED_ON]) as on:
        side = on.sides[EMBEDDED_ON]
        behind, pid = side.behind, side.children[0].pid
        assert behind is not None

        def now() -> tuple[float, float, float]:
            return behind.metrics()[RECORDS], sum(cpu_s(pid)), sum(sum(cpu_s(child)) for child in descendants(pid))

        wrk(place, side.ports[SMALL], SMALL, connections=32, seconds=1)
        before = now()
        wrk(place, side.ports[SMALL], SMALL, connections=32, seconds=seconds)
        written, own_s, others_s = (after - earlier for after, earlier in zip(now(), before, strict=True))
    return written, own_s / written * 1e6, others_s / written * 1e6


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.recorded", description="Processor time of a recorded request.")
    parser.add_argument("--seconds", type=int, default=4)
    chosen = parser.parse_args()
    more_files()
    with tempfile.TemporaryDirectory() as place:
        written, own_us, others_us = measure(Path(place), seconds=chosen.seconds)
    print(f"{written:,.0f} records: {own_us:.1f} µs each of the coordinator, {others_us:.1f} µs of the process that writes")


if __name__ == "__main__":
    main()
