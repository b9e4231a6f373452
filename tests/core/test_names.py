"""Names of models: a real Ollama's answers to 80 spellings are the judge; properties for the rest."""

import json
import string
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from core import names
from core.errors import RemoteError

RECORDED = json.loads((Path(__file__).parent / "recorded_names.json").read_text())
"""[route, name sent, status, error text] of a real server that held the models below."""

HELD = {"nano:latest", "me/nano:v1", "example.com:5000/me/nano:v1", "a" * 80 + ":" + "b" * 80}


@pytest.mark.parametrize(("route", "spelling", "status", "text"), RECORDED, ids=range(len(RECORDED)))
def test_every_recorded_spelling_means_what_ollama_took_it_for(route: str, spelling: str, status: int, text: str | None) -> None:
    key = names.key_or_none(spelling)
    match status:
        case 200:
            assert key is not None
            assert names.display(key) in HELD
            assert not names.is_cloud(key)
        case 404:
            assert key is not None
            assert names.display(key) not in HELD
            if route == "show":  # it alone answers with the display form, in the case of names it knows
                assert text == f"model '{names.display(key)}' not found" or text.lower() == f"model '{names.display(key)}' not found"
        case 403:
            assert key is not None
            assert names.is_cloud(key)
        case 400:
            with pytest.raises(RemoteError) as refused:
                names.normalise(spelling)
            assert (refused.value.status, str(refused.value)) == (400, text)
        case 500:  # a host name that is too long for a file name, which Ollama notices too late
            assert key is None
        case _:
            raise AssertionError(status)


def test_the_recordings_are_whole() -> None:
    assert len(RECORDED) == 162
    assert {status for _, _, status, _ in RECORDED} == {200, 400, 403, 404, 500}


@pytest.mark.parametrize(
    ("spelling", "key"),
    [
        ("hf.co/User/Repo-GGUF:Q4_K_M", "hf.co/user/repo-gguf:q4_k_m"),
        ("localhost:5000/a/b", "localhost:5000/a/b:latest"),
        ("https:///library/nano", "registry.ollama.ai/library/nano:latest"),
        ("nano:cloud", "registry.ollama.ai/library/nano:cloud"),
        ("nano:8b:cloud", "registry.ollama.ai/library/nano:8b-cloud"),
        ("nano:8B-CLOUD", "registry.ollama.ai/library/nano:8b-cloud"),
        ("nano:8b:local", "registry.ollama.ai/library/nano:8b"),
        ("nano-cloud", "registry.ollama.ai/library/nano-cloud:latest"),
        ("me/x-cloud", "registry.ollama.ai/me/x-cloud:latest"),
        (" " * 1000 + "nano", "registry.ollama.ai/library/nano:latest"),
    ],
)
def test_spellings_beyond_the_recordings(spelling: str, key: str) -> None:
    assert names.normalise(spelling) == key


@pytest.mark.parametrize(
    "spelling", ["nano:-cloud", "\u212aitten", "\x1cnano", "a/b/c/d/e", "x" * 5000, "nano\ud800", "::", "a//b", "h" * 256 + "/a/b"]
)
def test_what_is_no_name(spelling: str) -> None:
    assert names.key_or_none(spelling) is None
    with pytest.raises(RemoteError, match="invalid model name"):
        names.normalise(spelling)


def test_the_longest_name_that_is_one() -> None:
    longest = f"{'h' * 255}/{'n' * 80}/{'m' * 80}:{'t' * 80}"
    assert names.key_or_none(longest) == longest


FIRST = string.ascii_letters + string.digits + "_"
part = st.builds(lambda first, rest: first + rest, st.sampled_from(FIRST), st.text(FIRST + "-.", max_size=12))
namespace = st.builds(lambda first, rest: first + rest, st.sampled_from(FIRST), st.text(FIRST + "-", max_size=12))
tag = part.filter(lambda tag: tag.lower() not in ("local", "cloud") and not tag.lower().endswith("-cloud"))


@given(model=part, space=namespace, tag=tag)
def test_all_spellings_of_one_model_have_one_key(model: str, space: str, tag: str) -> None:
    full = f"registry.ollama.ai/{space}/{model}:{tag}"
    key = names.normalise(full)
    assert key == full.lower()
    for spelling in (f"{space}/{model}:{tag}", full.upper(), f"https://{full}", f" {full}\n", f"{full}:local", f"{full}: LOCAL"):
        assert names.normalise(spelling) == key
    if tag == "latest":
        assert names.normalise(f"{space}/{model}") == key
    if space == "library":
        assert names.normalise(f"{model}:{tag}") == key


@given(
    st.one_of(
        st.text(max_size=40),
        st.text(FIRST + "-./:@ ", max_size=40),
        st.builds(lambda a, b: a + b, part, st.sampled_from([":cloud", "-cloud", ":local", ":"])),
    )
)
@example("x:a-cloud:cloud")
@example("x:local-cloud")
def test_a_key_reads_back_as_itself(spelling: str) -> None:
    key = names.key_or_none(spelling)
    if key is None:
        with pytest.raises(RemoteError):
            names.normalise(spelling)
        return
    assert names.normalise(spelling) == key
    assert key == key.lower()
    assert names.normalise(names.display(key)) == key
    assert names.normalise(key) == key
    host, space, model = key.split("/")
    assert all((host, space, *model.split(":")))
    assert len(names.display(key)) <= len(key)


def test_a_cloud_name_never_means_a_local_model() -> None:
    assert names.is_cloud(names.normalise("gpt-oss:120b-cloud"))
    assert not names.is_cloud(names.normalise("my-cloud:7b"))
    assert names.normalise("gpt-oss:120b-cloud") != names.normalise("gpt-oss:120b")


def test_the_namespace_keeps_its_case() -> None:
    assert names.namespace("hf.co/User/Repo:Q4") == "User"
    assert names.namespace("Me/nano") == "Me"
    assert names.namespace("nano:latest") == "library"


def test_the_memory_of_spellings_is_bounded() -> None:
    for number in range(names.CACHE_MAX + 100):
        names.key_or_none(f"m{number}")
    assert names._remembered.cache_info().currsize <= names.CACHE_MAX
    before = names._remembered.cache_info().currsize
    names.key_or_none("x" * (names.CACHED_LENGTH_MAX + 1))
    assert names._remembered.cache_info().currsize == before
