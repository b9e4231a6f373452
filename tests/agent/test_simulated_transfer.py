"""Pulls and pushes of the simulated Ollama: the recorded lines in the recorded order, in virtual time; what is left on disk after each."""

import itertools
import json
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

import msgspec
import ollama
import pytest
import trio
import trio.testing

from agent.simulated import Failure, Knobs, Registry, SimulatedModel, SimulatedOllama, recorded_models
from agent.simulated.answers import go_json
from agent.simulated.library import Library
from agent.simulated.models import Layer, text_layer
from agent.simulated.reading import Refusal
from agent.simulated.transfer import Lines, Transfers
from tests.agent.conversations import Conversation, alike, load
from tests.fleet.rawhttp import ask

HOST = "127.0.0.1:5005/library"
SPEED = 0.7e6
DENIED = '{"errors":[{"code":"DENIED","message":"requested access to the resource is denied"}]}'
NO_PUSH = '403: {"errors":[{"code":"DENIED","message":"no push"}]}'
TLS_REALM = 'realm host "" does not match original host "127.0.0.1:5005"'


def model(name: str, **changes: Any) -> SimulatedModel:
    """`name` of the recorded registry: weights, a template and a configuration that all of them share."""
    tiny = next(known for known in recorded_models() if known.name == "tiny:latest")
    small = tiny.all_layers[1:]
    weights = Layer(text_layer(f"{name} {sorted(changes)}").digest, changes.pop("weights_bytes", 679_648))
    return msgspec.structs.replace(tiny, name=name, digest="", layers=(weights, *small), **changes)


def failure(kind: Any, text: str = "", **more: Any) -> Failure:
    return Failure(kind=kind, text=text, **more)


FAILURES: dict[str, Failure] = {
    "pull/blob-get-500": failure("blob", "context deadline exceeded", seconds=30),
    "pull/blob-get-404": failure("blob", "context deadline exceeded", seconds=30),
    "pull/cdn-500-nostream": failure("blob", "max retries exceeded: EOF", seconds=63),
    "pull/blob-head-404": failure("blob", "file does not exist"),
    "pull/blob-head-500": failure("blob", "500: "),
    "pull/mode-plain": failure("blob", "http: no Location header in response"),
    "pull/mode-same": failure("blob", "http: no Location header in response"),
    "pull/part-file-empty": failure("blob", "EOF"),
    "pull/registry-restart": failure("cut", after_bytes=300_000, times=1),
    "pull/cut-once": failure("cut", after_bytes=300_000, times=1),
    "pull/stall-short": failure("stall", after_bytes=300_000, seconds=8, times=1),
    "pull/stall": failure("stall", after_bytes=300_000, seconds=40, times=1),
    "pull/digest-mismatch": failure("corrupt"),
    "pull/digest-mismatch-nostream": failure("corrupt"),
    "pull/manifest-401": failure("manifest", TLS_REALM),
    "pull/manifest-401-notoken": failure("manifest", "404: not found"),
    "pull/manifest-401-token": failure("manifest", "unauthorized: access denied"),
    "pull/manifest-403": failure("manifest", f"403: {DENIED}"),
    "pull/manifest-403-nostream": failure("manifest", f"403: {DENIED}"),
    "pull/manifest-412": failure("manifest", '412: {"errors":[{"code":"x","message":"needs a newer version"}]}'),
    "pull/manifest-429": failure("manifest", "429: slow down"),
    "pull/manifest-500": failure("manifest", "500: internal"),
    "pull/manifest-html": failure("manifest", "invalid character '<' looking for beginning of value"),
    "pull/manifest-slow": failure("slow", seconds=2),
    "push/blob-401": failure("upload", "404: not found"),
    "push/blob-401-nochallenge": failure("upload", TLS_REALM),
    "push/blob-403": failure("upload", "403: "),
    "push/upload-403": failure("upload", NO_PUSH),
    "push/upload-500": failure("upload", "500: oops"),
    "push/patch-500-nostream": failure("upload", "max retries exceeded: http status 500 Internal Server Error: bad", seconds=63),
    "push/manifest-403": failure("publish", f"403: {DENIED}"),
}
PRESENT = {
    "pull/case", "pull/present", "pull/present-nostream", "pull/name-key", "pull/http-scheme-insecure", "pull/after-failures",
    "pull/manifest-slow", "pull/disk-full-present", "pull/digest-mismatch-two-again", "pull/updated-loaded",
}  # fmt: skip
"""Where the model was there."""
BARE = {
    "pull/registry-restart",
    "pull/new",
    "pull/digest-mismatch",
    "pull/digest-mismatch-nostream",
    "pull/close-resume",
    "pull/mode-location",
}
"""Where even the small layers were not there."""
FAST = {"pull/mode-location"}
"""Where every layer came within 60 ms."""
NOT_THE_SAME = {
    "pull/blob-head-zero": "a registry that lies about sizes",
    "pull/blob-head-zero-again": "the same",
    "pull/digest-mismatch-two": "two wrong blobs at once",
    "pull/manifest-empty": "a manifest without layers",
    "pull/blob-head-zero-tags": "no pull in it",
}
SPELLED = {"pull/unknown", "pull/unknown-nostream", "pull/unknown-tag", "push/unknown", "push/unknown-nostream", "push/bad-name"}


def node(case: str, *, fast: bool) -> tuple[Library, Transfers]:
    published = [model(f"{HOST}/{name}:latest") for name in ("tiny", "tiny2", "far", "upd", "race", "raw", "nano-c", "mid", "pc", "nano")]
    registry = Registry(published, bytes_s=1e12 if fast else SPEED, closed=("127.0.0.1:5999",))
    if case in FAILURES:
        registry.fail(FAILURES[case])
    there = published if case in PRESENT or case.startswith("push/") else []
    library = Library(there, Knobs(), lambda: 0)
    if case not in BARE:
        for layer in published[0].all_layers[1:]:
            library.receive(layer)
    if case.startswith("push/") and case not in ("push/again", "push/case", "push/http-scheme-insecure", "push/manifest-403"):
        transfers = Transfers(library, Registry([], bytes_s=SPEED))
        if case in FAILURES:
            transfers.registry.fail(FAILURES[case])
        return library, transfers
    return library, Transfers(library, registry)


async def told(lines: Lines) -> list[dict[str, Any]]:
    """The lines, and what the client is told at their end."""
    out: list[dict[str, Any]] = []
    try:
        async with aclosing(lines) as source:
            async for line in source:
                out.append(json.loads(go_json(line)))
    except Refusal as refusal:
        out.append({"error": refusal.text})
    return out


def steps(lines: list[dict[str, Any]]) -> list[str]:
    """What is told, step by step: of a layer only whether it is on its way or there. Layers that are there may be many or one."""
    out: list[str] = []
    for line in lines:
        text = line.get("status") or f"error {alike(line.get('error', ''))}"
        if "digest" in line:
            completed, total = line.get("completed"), line.get("total", 0)
            text = f"{text.split()[0]} {'unknown' if completed is None else 'there' if completed == total else 'partly'}"
            assert list(line) == [name for name in ("status", "digest", "total", "completed") if name in line]
        if not out or out[-1] != text:
            out.append(text)
    return out


def recorded_lines(conversation: Conversation) -> list[dict[str, Any]]:
    body = next(turn.answer.body for turn in conversation.turns if turn.target in ("/api/pull", "/api/push"))
    return [json.loads(line) for line in body.splitlines() if line.strip()]


def asked(conversation: Conversation) -> dict[str, Any]:
    sent = next(turn.sent for turn in conversation.turns if turn.target in ("/api/pull", "/api/push"))
    return {name.lower(): value for name, value in json.loads(sent.partition(b"\r\n\r\n")[2]).items()}


def cases() -> list[Any]:
    found = []
    for conversation in [*load("pull"), *load("push")]:
        name = conversation.case
        transfers = [turn for turn in conversation.turns if turn.target in ("/api/pull", "/api/push")]
        if len(transfers) != 1 or not transfers[0].received or transfers[0].answer.status in (400,) or not transfers[0].answer.whole:
            continue
        alone = len(conversation.turns) == 1 or name in ("pull/new", "pull/updated-loaded")
        if (
            alone
            and name not in NOT_THE_SAME
            and not any(word in name for word in ("noprune", "disk-full-n", "disk-full", "parts", "many", "fast"))
        ):
            found.append(pytest.param(conversation, id=name))
    return found


@pytest.mark.parametrize("conversation", cases())
async def test_recorded_transfers_tell_the_recorded_lines(conversation: Conversation, autojump_clock: trio.testing.MockClock) -> None:
    fields, recorded = asked(conversation), recorded_lines(conversation)
    _, transfers = node(conversation.case, fast=conversation.case in FAST)
    if conversation.case == "pull/updated-loaded":
        transfers.registry.publish(model(f"{HOST}/upd:latest", weights_bytes=700_000, template="another"))
    verb = transfers.pull if conversation.turns[0].target == "/api/pull" or "pull/" in conversation.case else transfers.push
    lines = steps(await told(verb(fields.get("model") or fields.get("name", ""), insecure=bool(fields.get("insecure")))))
    if fields.get("stream") is False:
        lines = lines[-1:]
    assert lines == steps(recorded)


async def lines_of(transfers: Transfers, name: str) -> AsyncIterator[dict[str, Any]]:
    async with aclosing(transfers.pull(name, insecure=True)) as source:
        async for line in source:
            yield line


async def test_a_line_comes_every_sixty_milliseconds(autojump_clock: trio.testing.MockClock) -> None:
    _, transfers = node("pull/new", fast=False)
    began, times = trio.current_time(), []
    async for line in lines_of(transfers, f"{HOST}/tiny"):
        if "completed" in line:
            times.append(round(trio.current_time() - began, 6))
    assert times == [round(0.06 * number, 6) for number in range(1, len(times) + 1)]
    assert len(times) == int(679_648 / SPEED / 0.06)


async def test_what_came_is_kept_when_the_client_leaves(autojump_clock: trio.testing.MockClock) -> None:
    library, transfers = node("pull/close-resume", fast=False)
    with trio.move_on_after(0.5):
        async for _ in lines_of(transfers, f"{HOST}/tiny"):
            pass
    assert library.rows() == []
    kept = sum(library.partial.values())
    assert kept == int(0.5 * SPEED)
    first, *_ = [line async for line in lines_of(transfers, f"{HOST}/tiny") if "completed" in line]
    assert first["completed"] == kept + int(0.06 * SPEED)
    assert [row.name for row in library.rows()] == [f"{HOST}/tiny:latest"]


async def test_two_clients_share_a_download_and_one_may_leave(autojump_clock: trio.testing.MockClock) -> None:
    _, transfers = node("pull/new", fast=False)
    began = trio.current_time()
    ends: list[float] = []

    async def pull(name: str, after_s: float, leaves_s: float) -> None:
        await trio.sleep(after_s)
        with trio.move_on_after(leaves_s):
            lines = [line async for line in lines_of(transfers, name)]
            assert lines[-1] == {"status": "success"}
            ends.append(trio.current_time() - began)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(pull, f"{HOST}/tiny", 0.0, 0.4)
        nursery.start_soon(pull, f"{HOST}/tiny", 0.3, 99.0)
    assert ends == [pytest.approx(679_648 / SPEED, abs=0.1)]


async def test_a_stall_makes_completed_go_back(autojump_clock: trio.testing.MockClock) -> None:
    _, transfers = node("pull/stall", fast=False)
    done = [line["completed"] async for line in lines_of(transfers, f"{HOST}/far") if line.get("total") == 679_648 and "completed" in line]
    assert any(later < earlier for earlier, later in itertools.pairwise(done))


async def test_a_full_disk_keeps_what_came(autojump_clock: trio.testing.MockClock) -> None:
    library = Library([], Knobs(disk_bytes=300_000), lambda: 0)
    transfers = Transfers(library, Registry([model("tiny:latest")], bytes_s=SPEED))
    lines = await told(transfers.pull("tiny"))
    assert "no space left on device" in lines[-1]["error"]
    assert library.free_bytes() == 0


async def test_what_is_published_anew_replaces_the_layers_of_before(autojump_clock: trio.testing.MockClock) -> None:
    library, transfers = node("pull/present", fast=True)
    before = library.find(f"{HOST}/tiny")
    assert before is not None
    transfers.registry.publish(model(f"{HOST}/tiny:latest", weights_bytes=700_000, template="x", family="other"))
    new = msgspec.structs.replace(model("another-name:latest"), name=f"{HOST}/tiny:latest", digest="ab" * 32)
    transfers.registry.publish(new)
    lines = await told(transfers.pull(f"{HOST}/tiny", insecure=True))
    assert {"status": "removing unused layers"} in lines
    after = library.find(f"{HOST}/tiny")
    assert after is not None
    assert after.hex_digest == "ab" * 32
    assert before.all_layers[0].digest not in library.blobs


async def test_a_delete_meanwhile_makes_success_a_lie(autojump_clock: trio.testing.MockClock) -> None:
    library, transfers = node("pull/present", fast=False)
    tiny = library.find(f"{HOST}/tiny")
    assert tiny is not None
    big = Layer("77" * 32, 780_000)
    race = msgspec.structs.replace(tiny, name=f"{HOST}/hollow:latest", digest="", layers=(tiny.all_layers[0], big, *tiny.all_layers[1:]))
    transfers.registry.publish(race)
    last: dict[str, Any] = {}
    async for line in lines_of(transfers, f"{HOST}/hollow"):
        if line.get("total") == 780_000 and f"{HOST}/tiny:latest" in [row.name for row in library.rows()]:
            for row in library.rows():
                library.delete(row.name)
        last = line
    assert last == {"status": "success"}
    hollow = library.find(f"{HOST}/hollow")
    assert hollow is not None
    assert not library.whole(hollow)


async def test_the_official_client_pulls_copies_pushes_and_deletes() -> None:
    def use(url: str) -> None:
        client = ollama.Client(host=url)
        seen = [part.status for part in client.pull("qwen3:8b", stream=True)]
        assert (seen[0], seen[-1]) == ("pulling manifest", "success")
        client.copy("qwen3:8b", "mine")
        client.delete("qwen3:8b")
        assert [row.model for row in client.list().models] == ["mine:latest"]
        assert client.push("mine").status == "success"
        with pytest.raises(ollama.ResponseError, match="pull model manifest: file does not exist"):
            client.pull("nosuch")

    registry = Registry(["qwen3:8b"], bytes_s=1e12)
    async with SimulatedOllama(models=(), registry=registry, hash_bytes_s=1e13).serve() as sim:
        await trio.to_thread.run_sync(use, sim.url)


async def test_how_a_transfer_ends_without_a_stream() -> None:
    async with SimulatedOllama(models=(), registry=Registry(["qwen3:8b"], bytes_s=1e12), hash_bytes_s=1e13).serve() as sim:
        done = await ask(sim.port, "POST", "/api/pull", {"name": "qwen3:8b", "stream": False})
        unknown = await ask(sim.port, "POST", "/api/pull", {"model": "nosuch", "stream": False})
        bad = await ask(sim.port, "POST", "/api/pull", {"model": "a b"})
        nameless = await ask(sim.port, "POST", "/api/push", {})
    assert (done.status, done.headers["content-type"], done.body) == (200, "application/json", b'{"status":"success"}')
    assert (unknown.status, unknown.headers["content-type"]) == (500, "application/json")
    assert (bad.status, bad.json()) == (400, {"error": "invalid model name"})
    assert (nameless.status, nameless.json()) == (400, {"error": "model is required"})


async def test_an_update_of_a_loaded_model_leaves_two_rows_of_one_name() -> None:
    old, new = model("upd:latest"), msgspec.structs.replace(model("upd-new:latest"), name="upd:latest", digest="cd" * 32, weights="new")
    chat = {"model": "upd", "messages": [{"role": "user", "content": "x"}], "stream": False}
    async with SimulatedOllama(models=[old], registry=Registry([new], bytes_s=1e12), load_s=0.0).serve() as sim:
        assert (await ask(sim.port, "POST", "/api/chat", chat)).status == 200
        await ask(sim.port, "POST", "/api/pull", {"model": "upd", "stream": False})
        assert (await ask(sim.port, "POST", "/api/generate", {"model": "upd", "keep_alive": 0})).json()["done_reason"] == "unload"
        assert (await ask(sim.port, "POST", "/api/chat", chat)).status == 200
        rows = (await ask(sim.port, "GET", "/api/ps")).json()["models"]
    assert [row["name"] for row in rows] == ["upd:latest"] * 2
    assert {row["digest"] for row in rows} == {old.hex_digest, "cd" * 32}


def test_every_failure_is_about_a_recording() -> None:
    recorded = {conversation.case for conversation in [*load("pull"), *load("push")]}
    assert set(FAILURES) | PRESENT | BARE | set(NOT_THE_SAME) | SPELLED <= recorded
