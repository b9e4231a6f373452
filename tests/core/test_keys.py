"""What an API key opens, and how much of it."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from core import keys
from core.errors import RemoteError
from core.keys import DAY_MS, INFERENCE, MANAGEMENT, MINUTE_MS, Key, Keys, Use, make_key, may_use
from core.units import UnixMs

NOW = UnixMs(20_000 * DAY_MS + 5_000)


def key(**fields: object) -> Key:
    return make_key(**{"key_id": "k1", "name": "laptop", "now": NOW, **fields})  # type: ignore[arg-type]


def ring(**fields: object) -> Keys:
    found = Keys()
    found.add(key(**fields))
    return found


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"name": ""}, "name"),
        ({"name": "x" * 101}, "name"),
        ({"name": "a\nb"}, "name"),
        ({"scopes": ()}, "scopes"),
        ({"scopes": ("root",)}, "scopes"),
        ({"models": ("a",) * 201}, "models"),
        ({"models": ("a b",)}, "models"),
        ({"expires_at": NOW}, "expires_at"),
        ({"requests_per_minute": 0}, "requests_per_minute"),
        ({"requests_per_minute": 60_001}, "requests_per_minute"),
        ({"tokens_per_day": 0}, "tokens_per_day"),
    ],
)
def test_a_field_that_cannot_be_used_is_named(fields: dict[str, object], named: str) -> None:
    with pytest.raises(RemoteError, match=named):
        key(**fields)


def test_a_key_is_made_of_what_was_asked_for() -> None:
    made = key(name=" laptop ", scopes=(INFERENCE, INFERENCE), models=("Llama3", "llama3:latest", "qwen3:8b"), requests_per_minute=5)
    assert (made.name, made.scopes, made.requests_per_minute) == ("laptop", (INFERENCE,), 5)
    assert made.models == ("registry.ollama.ai/library/llama3:latest", "registry.ollama.ai/library/qwen3:8b")


@pytest.mark.parametrize("spelling", ["llama3", "LLAMA3:Latest", "library/llama3", "registry.ollama.ai/library/llama3:latest", " llama3 "])
def test_every_spelling_of_an_allowed_model_is_allowed(spelling: str) -> None:
    assert may_use(key(models=("llama3",)), spelling)


@pytest.mark.parametrize("spelling", ["llama3:8b", "other/llama3", "qwen3", "", "a b", "llama3-cloud:x", "llama3:cloud"])
def test_another_model_is_not(spelling: str) -> None:
    assert not may_use(key(models=("llama3",)), spelling)
    assert may_use(key(), spelling)


def test_scope_and_expiry() -> None:
    found = ring(scopes=(MANAGEMENT,), expires_at=NOW + 10)
    assert found.opens("k1", MANAGEMENT, now=UnixMs(NOW + 9))
    assert not found.opens("k1", MANAGEMENT, now=UnixMs(NOW + 10))
    assert not found.opens("k1", INFERENCE, now=NOW)
    assert not found.opens("other", MANAGEMENT, now=NOW)
    assert ring().opens("k1", INFERENCE, now=UnixMs(NOW + 10 * DAY_MS))


@given(st.integers(1, 5), st.lists(st.integers(0, 30_000), max_size=40))
def test_no_minute_sees_more_requests_than_the_key_may_make(limit: int, gaps_ms: list[int]) -> None:
    found = ring(requests_per_minute=limit)
    now, admitted = NOW, []
    for gap in gaps_ms:
        now = UnixMs(now + gap)
        refusal = found.admit("k1", now=now)
        if refusal is None:
            admitted.append(now)
        else:
            assert refusal.status == 429
            assert refusal.retry_after_s is not None
            assert found.listed()[0][1].refused > 0
            later = UnixMs(now + refusal.retry_after_s * 1000)
            assert sum(1 for moment in admitted if moment > later - MINUTE_MS) < limit
    assert all(sum(1 for moment in admitted if end - MINUTE_MS < moment <= end) <= limit for end in admitted)
    assert found.listed()[0][1].requests == len(admitted)


def test_the_tokens_of_a_day_end_at_midnight() -> None:
    found = ring(tokens_per_day=100)
    assert found.admit("k1", now=NOW) is None
    found.spend("k1", prompt_tokens=60, output_tokens=40, now=NOW)
    refusal = found.admit("k1", now=UnixMs(NOW + 1))
    assert refusal is not None
    assert (refusal.status, refusal.retry_after_s) == (429, (DAY_MS - 5_001 + 999) // 1000)
    tomorrow = UnixMs(20_001 * DAY_MS)
    assert found.admit("k1", now=tomorrow) is None
    found.spend("k1", prompt_tokens=1, output_tokens=2, now=UnixMs(tomorrow + DAY_MS))
    use = found.listed()[0][1]
    assert (use.tokens_today, use.prompt_tokens, use.output_tokens, use.last_used_at) == (3, 61, 42, tomorrow)


@pytest.mark.parametrize(
    ("model", "told_once", "status"),
    [("llama3", True, None), ("llama3", False, 400), (None, True, 400), ("qwen3", True, 403)],
)
def test_the_rule_about_models(model: str | None, told_once: bool, status: int | None) -> None:
    found = ring(models=("llama3",))
    refusal = found.judge_model("k1", model, told_once=told_once)
    assert (refusal and refusal.status) == status
    assert found.listed()[0][1].refused == (status is not None)


def test_a_key_without_models_opens_whatever_the_body_says() -> None:
    assert ring().judge_model("k1", None, told_once=False) is None


def test_the_sentence_names_a_few_of_the_models() -> None:
    refusal = ring(models=tuple(f"m{n}" for n in range(7))).judge_model("k1", "other", told_once=True)
    assert refusal is not None
    assert refusal.text.endswith("only for m0:latest, m1:latest, m2:latest, m3:latest, m4:latest, …")


def test_a_removed_key_is_gone() -> None:
    found = ring()
    assert len(found) == 1
    assert found.get("k1") == found.remove("k1")
    assert (found.get("k1"), len(found), found.listed()) == (None, 0, [])
    found.spend("k1", prompt_tokens=1, output_tokens=1, now=NOW)
    refusal = found.judge_model("k1", "llama3", told_once=True)
    assert refusal is not None
    assert refusal.status == 401
    with pytest.raises(RemoteError) as caught:
        found.remove("k1")
    assert caught.value.status == 404


def test_what_was_used_before_a_restart_counts() -> None:
    found = Keys()
    found.add(key(tokens_per_day=10), Use(day=20_000, tokens_today=10))
    assert found.admit("k1", now=NOW) is not None


def test_there_is_a_limit_to_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keys, "KEYS_MAX", 1)
    found = ring()
    found.add(key(name="again"))
    with pytest.raises(RemoteError) as caught:
        found.add(key(key_id="k2"))
    assert caught.value.status == 409
