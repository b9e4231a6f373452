"""`ollama-router keys` against a coordinator's own words."""

from typing import Any

import pytest
from click.testing import CliRunner, Result

from servers.cli import main

USED = {"requests": 2, "refused": 0, "prompt_tokens": 3, "output_tokens": 4, "tokens_today": 7, "last_used_at": None}
KEY = {
    "id": "1", "name": "lap[red]top\x1b", "scopes": ["inference"], "models": ["m:latest"], "expires_at": None,
    "requests_per_minute": 5, "tokens_per_day": 100, "used": USED,
}  # fmt: skip


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str, Any]]:
    calls: list[tuple[str, str, Any]] = []

    def call(_: object, method: str, path: str, body: Any = None) -> Any:
        calls.append((method, path, body))
        return {"POST": {**KEY, "key": "ork-secret"}, "GET": [KEY, {**KEY, "id": "2"}], "DELETE": None}[method]

    monkeypatch.setattr("servers.remote.Remote.call", call)
    return calls


def invoke(*arguments: str) -> Result:
    return CliRunner().invoke(main, ["keys", *arguments])


def test_the_secret_stands_alone_on_standard_output(asked: list[tuple[str, str, Any]]) -> None:
    result = invoke("add", "laptop", "--model", "m", "--model", "n", "--days", "3", "--requests-per-minute", "5", "--tokens-per-day", "9")
    assert result.stdout == "ork-secret\n"
    (_, _, body) = asked[0]
    assert body["models"] == ("m", "n")
    assert body["scopes"] == ("inference",)
    assert body["expires_at"].endswith("+00:00")
    assert (body["requests_per_minute"], body["tokens_per_day"]) == (5, 9)


def test_the_list_shows_use_and_limits(asked: list[tuple[str, str, Any]]) -> None:
    output = invoke("list").output
    for text in ("lap[red]top?", "2 (≤ 5/min)", "7 of 100", "m:latest", "never"):
        assert text in output
    assert asked == [("GET", "/api/keys", None)]


def test_a_key_is_removed_by_its_id(asked: list[tuple[str, str, Any]]) -> None:
    assert invoke("remove", "2").output == "2 is removed.\n"
    assert asked[-1] == ("DELETE", "/api/keys/2", None)


@pytest.mark.parametrize(("named", "says"), [("nobody", "there is no key 'nobody'"), (KEY["name"], "2 keys are called")])
def test_what_names_no_single_key_removes_nothing(asked: list[tuple[str, str, Any]], named: str, says: str) -> None:
    result = invoke("remove", named)
    assert result.exit_code == 1
    assert says in result.output
    assert [method for method, _, _ in asked] == ["GET"]
