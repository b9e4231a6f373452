"""What a node says while it pulls."""

import itertools
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.transfer import LAYERS_MAX, LINE_MAX_BYTES, Layer, PullReader, explained, farther, joined, may_repeat, what_is_wrong

NEW = (
    b'{"status":"pulling manifest"}\n'
    b'{"status":"pulling dde5aa3fc5ff","digest":"sha256:dde5","total":100}\n'
    b'{"status":"pulling dde5aa3fc5ff","digest":"sha256:dde5","total":100,"completed":60}\n'
    b'{"status":"pulling abcdefabcdef","digest":"sha256:abcd","total":5,"completed":5}\n'
    b'{"status":"verifying sha256 digest"}\n{"status":"writing manifest"}\n{"status":"success"}\n'
)


def read(data: bytes, *cuts: int) -> PullReader:
    reader = PullReader()
    edges = [0, *sorted(cut % (len(data) + 1) for cut in cuts), len(data)]
    for start, end in itertools.pairwise(edges):
        reader.feed(data[start:end])
    reader.close()
    return reader


@given(st.lists(st.integers(min_value=0), max_size=6))
def test_a_pull_is_read_the_same_however_its_bytes_are_cut(cuts: list[int]) -> None:
    reader = read(NEW, *cuts)
    assert reader.succeeded
    assert reader.error is None
    assert reader.phase == "success"
    assert reader.layers == (Layer("sha256:dde5", 100, 60), Layer("sha256:abcd", 5, 5))


def test_an_error_is_the_last_line_also_without_a_line_end() -> None:
    reader = read(b'{"status":"pulling manifest"}\n{"error":"pull model manifest: file does not exist"}')
    assert reader.error == "pull model manifest: file does not exist"
    assert not reader.succeeded


def test_success_is_over_when_something_follows_it() -> None:
    assert not read(NEW + b'{"status":"pulling manifest"}\n').succeeded


@pytest.mark.parametrize("line", [b"", b"[]", b"5", b"{", b"\xff", b'{"status":5}', b"[" * 5000, b'{"digest":"x"}'])
def test_what_is_no_line_of_ollamas_is_passed_over(line: bytes) -> None:
    reader = read(line + b"\n" + NEW)
    assert reader.succeeded


def test_numbers_that_cannot_be_are_not_told() -> None:
    def sizes(total: Any, completed: Any) -> tuple[int, int]:
        line = {"status": "pulling x", "digest": "d", "total": total, "completed": completed}
        (layer,) = read(json.dumps(line).encode() + b"\n").layers
        return layer.total, layer.completed

    assert sizes(10, 4) == (10, 4)
    assert sizes(10, 11) == (10, 10)
    assert sizes(-1, 4) == (0, 0)
    assert sizes(True, "4") == (0, 0)
    assert sizes(1 << 60, 1.5) == (0, 0)


def test_what_a_node_sends_has_limits() -> None:
    many = b"".join(b'{"status":"pulling x","digest":"%d","total":1}\n' % number for number in range(LAYERS_MAX + 5))
    assert len(read(many).layers) == LAYERS_MAX
    reader = PullReader()
    for _ in range(40):
        reader.feed(b"x" * 5000)
    assert len(reader._held) <= LINE_MAX_BYTES


LAYER = st.builds(Layer, st.sampled_from("abc"), st.integers(0, 10), st.integers(0, 10))


@given(st.lists(LAYER), st.lists(LAYER))
def test_what_is_known_of_a_layer_never_goes_back(first: list[Layer], then: list[Layer]) -> None:
    known = joined((), first)
    later = {layer.digest: layer for layer in joined(known, then)}
    for layer in known:
        assert later[layer.digest].completed >= layer.completed
    assert all(layer.completed <= layer.total for layer in later.values())


def test_joined_has_a_limit() -> None:
    assert len(joined((), [Layer(str(number)) for number in range(LAYERS_MAX + 3)])) == LAYERS_MAX


def test_farther_keeps_a_total_that_is_not_told_again() -> None:
    assert farther(Layer("a", 10, 4), Layer("a", 0, 6)) == Layer("a", 10, 6)


@pytest.mark.parametrize(
    ("error", "again"),
    [
        ("pull model manifest: file does not exist", False),
        ("file does not exist", False),
        ("pull model manifest: 403: no", False),
        ("pull model manifest: 412: a newer version is needed", False),
        ("pull model manifest: 429: slow down", True),
        ("pull model manifest: 500: oops", True),
        ("pull model manifest: unauthorized: access denied", False),
        ("write /m/blobs/sha256-1-partial: no space left on device", False),
        ("EOF", False),
        ("max retries exceeded: EOF", True),
        ("context deadline exceeded", True),
        ("digest mismatch, file must be downloaded again: want sha256:1, got sha256:2", True),
        ("invalid model name", False),
        ('pull model manifest: Get "http://10.0.0.1:5000/v2/": dial tcp 10.0.0.1:5000: connect: connection refused', True),
    ],
)
def test_which_failures_are_worth_another_try(error: str, again: bool) -> None:
    assert may_repeat(error) is again


def test_paths_of_a_nodes_disk_stay_there() -> None:
    assert explained("write /usr/share/ollama/blobs/sha256-1-partial: no space left on device") == ("write <path>: no space left on device")
    assert explained(r"open C:\Users\me\m\blobs: no") == "open <path>: no"
    url = 'pull model manifest: Get "https://registry.example/v2/library/x/manifests/latest": tls: no'
    assert explained(url) == url
    assert "partial" in explained("EOF")
    assert len(explained("x" * 9999)) == 500


@pytest.mark.parametrize(
    ("row", "words"),
    [
        (None, "does not list"),
        ({"size": 0}, "empty"),
        ({"size": 99}, "99 bytes only"),
        ({"size": 100}, None),
        ({}, None),
        ("m:latest", None),
    ],
)
def test_success_is_believed_only_when_the_list_shows_it(row: object, words: str | None) -> None:
    wrong = what_is_wrong(row, [Layer("a", 60, 60), Layer("b", 40)])
    assert wrong is None if words is None else words in (wrong or "")
