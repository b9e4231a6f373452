"""The simulated Ollama against recorded conversations about models: names, copies, deletes, blobs, creations, lists.

Each conversation has a node of its own, with the models and blobs that the recorded one had as far as they matter. Pulls and pushes are in
`test_simulated_transfer.py`.
"""

import hashlib
from typing import Any

import msgspec
import pytest
import trio

from agent.simulated import Registry, SimulatedModel, SimulatedOllama, recorded_models
from agent.simulated.library import Blob
from tests.agent.conversations import Conversation, load, replay
from tests.fleet.rawhttp import ask, parse_answer

NOT_THE_SAME = {
    "copy/disk-full": "a disk without one free byte, to which a pull nevertheless writes small files",
    "delete/while-loading": "two requests at once; turns are taken one by one",
    "delete/loaded-expire": "waits for three seconds; a keep-alive is tried in test_simulated_server",
    "delete/in-stream-recreated": "its model was loaded by another conversation",
    "blobs/truncated-halfclose": "half-closes the connection; see below",
    "blobs/parallel-same": "two uploads at once; see below",
    "blobs/disk-full": "its body was not recorded; see below",
    "create/after-cloud": "cloud models are left out",
    "create/over-loaded": "a name that another conversation made",
    "create/close-mid-quantize": "a client that leaves",
}
AFTER = {"create/gguf": (), "create/gguf-again": ("create/gguf",), "create/show-of-params": ("create/from-params",)}
"""What has to be done before, on a node with `nano` alone where that is given."""
UPLOADED = "7004ab5c632879a354c17edf4a87b30de408c3862d75a5c1c39344b5a3776f57"
LARGE = "802d77031c8f39e02a96d1dfa4886ed6449c25e5b54fe7f3408dfc959897250c"
TEXT = "efebba2d0edc9cf4230597cc76d85bbe5a0ab8fe82437ea6054f027f25e9b104"
EXPECTED = "fac339c7a595002fe336b144597362db904acb61681cb00978ce0cf5aa9b0761"
BLOBS = {
    "blobs/head-present": UPLOADED, "blobs/head-present-dash": UPLOADED, "blobs/expect-present": EXPECTED, "blobs/post-present": TEXT,
    "blobs/post-present-unsent": TEXT, "blobs/post-present-sending": TEXT,
}  # fmt: skip
SPELLINGS = ("names/show", "names/chat-preload", "names/v1-chat", "names/copy-source", "names/copy-destination", "names/delete")


def models_there() -> list[SimulatedModel]:
    """What the recorded node had."""
    known = {model.name: model for model in recorded_models()}
    tiny, mid = known["tiny:latest"], known["mid:latest"]
    nano = msgspec.structs.replace(
        tiny, name="nano:latest", digest="", size_bytes=71_200, parameter_size="31K", context_length=2048, embedding_length=32
    )
    host = "127.0.0.1:5005/library"
    names = (
        "nano-c",
        "nano-d",
        "nano-copy",
        "nano-upper:v1",
        "nano:cloud",
        "me/nano:v1",
        "example.com:5000/me/nano:v1",
        f"{host}/nano",
        "gone",
    )
    others = [msgspec.structs.replace(nano, name=name if ":" in name.rpartition("/")[2] else f"{name}:latest") for name in names]
    more = [
        msgspec.structs.replace(tiny, name="cur:latest"),
        msgspec.structs.replace(mid, name="mid-x:latest"),
        msgspec.structs.replace(tiny, name=f"{host}/tiny:latest"),
    ]
    return [tiny, mid, nano, *others, *more]


def node_for(conversation: Conversation) -> SimulatedOllama:
    """A node as it was when `conversation` began."""
    present = models_there()
    if conversation.case == "names/show" or conversation.case in SPELLINGS:
        kept = ("tiny:latest", "nano:latest", "me/nano:v1", "example.com:5000/me/nano:v1")
        present = [model for model in present if model.name in kept]
        if conversation.case != "names/delete":
            present.append(msgspec.structs.replace(present[1], name="A" * 80 + ":" + "b" * 80))
    if conversation.case == "delete/literal-cloud":
        present = [model for model in present if model.name != "nano:cloud"]
    if conversation.case in ("tags/empty", "create/gguf", "create/gguf-again"):
        present = []
    sim = SimulatedOllama(models=present, speed=20, load_s=0.01, registry=Registry(present, closed=("127.0.0.1:5999",)))
    gone = sim.library.find("gone")
    if gone is not None:
        del sim.library.blobs[gone.all_layers[0].digest]
    if conversation.case in BLOBS:
        sim.library.blobs[BLOBS[conversation.case]] = Blob(100)
    if conversation.case.startswith("create/"):
        sim.library.blobs |= {UPLOADED: Blob(71_008), LARGE: Blob(418_741_376), TEXT: Blob(18, b"smal")}
    return sim


def cases() -> list[Any]:
    groups = ("names", "copy", "delete", "blobs", "tags", "create")
    found = [conversation for group in groups for conversation in load(group)]
    return [pytest.param(conversation, id=conversation.case) for conversation in found if conversation.case not in NOT_THE_SAME]


@pytest.mark.parametrize("conversation", cases())
async def test_a_recorded_conversation_goes_the_same_way(conversation: Conversation) -> None:
    sim = node_for(conversation)
    present = dict(sim.models)

    def put_back() -> None:
        for model in present.values():
            sim.library.add(model)
        for key in [key for key in sim.models if key not in present]:
            del sim.models[key]

    async with sim.serve():
        for earlier in AFTER.get(conversation.case, ()):
            assert await replay(next(other for other in load("create") if other.case == earlier), sim.port) == []
        before = put_back if conversation.case in SPELLINGS else None
        assert await replay(conversation, sim.port, before_turn=before) == []


def test_every_exception_is_about_a_recording() -> None:
    recorded = {
        conversation.case for group in ("names", "copy", "delete", "blobs", "tags", "create", "disk") for conversation in load(group)
    }
    assert set(NOT_THE_SAME) <= recorded


def upload(digest: str, size_bytes: int) -> bytes:
    return f"POST /api/blobs/sha256:{digest} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {size_bytes}\r\n\r\n".encode()


async def test_of_two_who_upload_one_blob_at_once_both_create_it() -> None:
    body = b"z" * 1000
    digest = hashlib.sha256(body).hexdigest()
    async with SimulatedOllama(models=()).serve() as sim:
        first, second = [await trio.open_tcp_stream("127.0.0.1", sim.port) for _ in range(2)]
        for line in (first, second):
            await line.send_all(upload(digest, len(body)) + body[:500])
        while sim.connections_accepted < 2:
            await trio.lowlevel.checkpoint()
        again = await trio.open_tcp_stream("127.0.0.1", sim.port)  # answered after the two heads have been read
        await again.send_all(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
        await again.receive_some(1000)
        answers = []
        for line in (first, second):
            await line.send_all(body[500:])
            answers.append((await line.receive_some(1000)).partition(b"\r\n")[0])
    assert answers == [b"HTTP/1.1 201 Created"] * 2


async def test_half_a_blob_is_not_kept() -> None:
    digest = hashlib.sha256(b"y" * 1000).hexdigest()
    async with SimulatedOllama(models=()).serve() as sim:
        line = await trio.open_tcp_stream("127.0.0.1", sim.port)
        await line.send_all(upload(digest, 1000) + b"y" * 10)
        await line.send_eof()
        said = b"".join([part async for part in line])
        assert parse_answer(said).status == 500
        assert parse_answer(said).json() == {"error": "unexpected EOF"}
        assert (await ask(sim.port, "HEAD", f"/api/blobs/sha256:{digest}")).status == 404


async def test_a_blob_that_does_not_fit_is_told_so() -> None:
    body = b"y" * 1000
    digest = hashlib.sha256(body).hexdigest()
    async with SimulatedOllama(models=(), disk_bytes=999).serve() as sim:
        answer = await ask(sim.port, "POST", f"/api/blobs/sha256:{digest}", body)
        assert (answer.status, "no space left on device" in answer.json()["error"]) == (500, True)
        assert (await ask(sim.port, "HEAD", f"/api/blobs/sha256:{digest}")).status == 404


async def test_nobody_reads_a_large_blob_that_is_there() -> None:
    digest = hashlib.sha256(b"").hexdigest()
    async with SimulatedOllama(models=()).serve() as sim:
        assert (await ask(sim.port, "POST", f"/api/blobs/sha256:{digest}", b"")).status == 201
        line = await trio.open_tcp_stream("127.0.0.1", sim.port)
        await line.send_all(upload(digest, 100_000_000))
        said = b"".join([part async for part in line])
        assert said.startswith(b"HTTP/1.1 200 OK")
        assert b"Connection: close" in said


async def test_a_name_is_taken_over_in_the_letter_case_that_is_there() -> None:
    async with SimulatedOllama(models=["Foo:Q4"]).serve() as sim:
        for destination in ("bar:q4", "FOO:q4", "foo:q8"):
            assert (await ask(sim.port, "POST", "/api/copy", {"source": "foo:Q4", "destination": destination})).status == 200
        rows = (await ask(sim.port, "GET", "/api/tags")).json()["models"]
    assert {row["name"] for row in rows} == {"Foo:Q4", "bar:Q4", "Foo:q8"}
    assert len({row["digest"] for row in rows}) == 1


async def test_equal_creations_have_equal_digests_and_another_base_name_another() -> None:
    digests = []
    for base in ("one:1b", "one:1b", "two:1b"):
        async with SimulatedOllama(models=["one:1b"]).serve() as sim:
            await ask(sim.port, "POST", "/api/copy", {"source": "one:1b", "destination": "two:1b"})
            made = await ask(sim.port, "POST", "/api/create", {"model": "new", "from": base, "system": "x", "stream": False})
            assert (made.status, made.json()) == (200, {"status": "success"})
            rows = (await ask(sim.port, "GET", "/api/tags")).json()["models"]
            digests += [row["digest"] for row in rows if row["name"] == "new:latest"]
    assert digests[0] == digests[1] != digests[2]


async def test_a_parameter_of_another_type_is_found_out_by_the_first_chat() -> None:
    async with SimulatedOllama(models=["one:1b"], load_s=0.0).serve() as sim:
        await ask(sim.port, "POST", "/api/create", {"model": "new", "from": "one:1b", "parameters": {"num_ctx": "many"}})
        answer = await ask(sim.port, "POST", "/api/chat", {"model": "new", "messages": [{"role": "user", "content": "x"}]})
    assert (answer.status, answer.json()) == (500, {"error": 'option "num_ctx" must be of type integer'})


async def test_a_hollow_model_can_do_nothing_until_the_node_is_restarted() -> None:
    sim = SimulatedOllama(models=["one:1b"], load_s=0.0)
    weights = sim.models[("registry.ollama.ai", "library", "one", "1b")].all_layers[0]
    said = {"model": "one:1b", "prompt": "x", "stream": False}
    del sim.library.blobs[weights.digest]
    async with sim.serve():
        assert (await ask(sim.port, "POST", "/api/generate", said)).json() == {"error": '"one:1b" does not support generate'}
        sim.library.receive(weights)
        assert (await ask(sim.port, "POST", "/api/generate", said)).status == 400
        assert (await ask(sim.port, "POST", "/api/show", {"model": "one:1b"})).status == 200
    async with sim.serve():
        assert (await ask(sim.port, "POST", "/api/generate", said)).status == 200
