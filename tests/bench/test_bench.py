"""The bars that hold on any machine: ratios to plain nginx in one run, and memory. Absolute figures belong to `make bench`."""

from pathlib import Path

import pytest

from tests.bench.measure import IDLE_KB_MAX, IDLE_STREAMS, RATIO_SMALL_MIN, RATIO_STREAM_MIN, compare, idle_stream_kb
from tests.bench.programs import SMALL, STREAM, all_running, more_files


@pytest.mark.slow
def test_the_router_reaches_its_share_of_plain_nginx(tmp_path: Path) -> None:
    more_files()
    with all_running(tmp_path) as bench:
        small = compare(bench, tmp_path, SMALL, connections=32, seconds=1, rounds=3)
        stream = compare(bench, tmp_path, STREAM, connections=32, seconds=1, rounds=3)
        idle_kb = idle_stream_kb(bench, IDLE_STREAMS)
    assert small.ratio >= RATIO_SMALL_MIN, small
    assert stream.ratio >= RATIO_STREAM_MIN, stream
    assert idle_kb <= IDLE_KB_MAX
