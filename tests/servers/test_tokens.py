"""Tokens and the files that keep two of them."""

import hashlib
import hmac
import stat
from pathlib import Path

import pytest

from core.errors import ConfigError, RemoteError
from core.units import AgentId, UnixMs
from servers.tokens import JOIN_TOKEN_LIFE_MS, JOIN_TOKENS_MAX, Tokens, kept_secret, open_data_dir

A, B = AgentId("a"), AgentId("b")


def tokens(join_token: str | None = None) -> Tokens:
    return Tokens(admin_token="admin-secret", join_token=join_token, fleet_secret="fleet-secret")


def test_the_data_directory_and_its_secrets_are_for_their_owner_only(tmp_path: Path) -> None:
    directory = open_data_dir(tmp_path / "data")
    made = Tokens.from_files(directory, admin_token=None, join_token=None)
    assert stat.S_IMODE(directory.stat().st_mode) == 0o700
    files = sorted(directory.iterdir())
    assert [file.name for file in files] == ["admin-token", "fleet-secret"]
    assert [stat.S_IMODE(file.stat().st_mode) for file in files] == [0o600, 0o600]
    assert made.is_admin(files[0].read_text().strip())


def test_secrets_survive_a_restart_and_lose_the_eyes_of_others(tmp_path: Path) -> None:
    first = kept_secret(tmp_path / "secret")
    (tmp_path / "secret").chmod(0o644)
    assert kept_secret(tmp_path / "secret") == first
    assert stat.S_IMODE((tmp_path / "secret").stat().st_mode) == 0o600
    assert kept_secret(tmp_path / "other") != first


@pytest.mark.parametrize("content", [b"", b"short\n", b"\xff\xfe\xff\xfe\xff\xfe\xff\xfe\xff"])
def test_a_secret_that_cannot_be_one_is_refused_and_left_alone(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "secret").write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        kept_secret(tmp_path / "secret")
    assert "short" not in str(caught.value).replace("too short", "")
    assert (tmp_path / "secret").read_bytes() == content


def test_a_data_directory_that_cannot_be_made_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="ROUTER_DATA_DIR"):
        open_data_dir(tmp_path / "file" / "data")


def test_a_derived_secret_is_the_same_after_a_restart_and_another_for_another_purpose() -> None:
    assert tokens().derived("a") == tokens().derived("a") != tokens().derived("b")
    assert "fleet-secret" not in tokens().derived("a")


def test_the_admin_token_of_the_environment_wins_and_makes_no_file(tmp_path: Path) -> None:
    made = Tokens.from_files(tmp_path, admin_token="from-the-environment", join_token=None)
    assert made.is_admin("from-the-environment")
    assert not made.is_admin("from-the-environmenT")
    assert not (tmp_path / "admin-token").exists()


def test_join_tokens_live_a_day_and_are_kept_as_hashes() -> None:
    made = tokens()
    token, until = made.mint_join_token(now=UnixMs(1000))
    assert until == 1000 + JOIN_TOKEN_LIFE_MS
    assert made.may_join(token, now=UnixMs(until - 1))
    assert not made.may_join(token, now=until)
    assert not made.may_join("another", now=UnixMs(1000))
    assert token not in repr(vars(made))


def test_the_join_token_of_the_environment_does_not_expire() -> None:
    made = tokens(join_token="for-ever-and-ever")
    assert made.may_join("for-ever-and-ever", now=UnixMs(1 << 50))
    assert not made.may_join("for-ever", now=UnixMs(0))


def test_join_tokens_are_limited_and_expired_ones_make_room() -> None:
    made = tokens()
    for _ in range(JOIN_TOKENS_MAX):
        made.mint_join_token(now=UnixMs(0))
    with pytest.raises(RemoteError) as caught:
        made.mint_join_token(now=UnixMs(1))
    assert caught.value.status == 429
    made.mint_join_token(now=UnixMs(JOIN_TOKEN_LIFE_MS))


def test_an_agents_token_is_its_own_until_the_next_one() -> None:
    made = tokens()
    first, other = made.mint_agent_token(A), made.mint_agent_token(B)
    assert (made.agent_of(first), made.agent_of(other)) == (A, B)
    second = made.mint_agent_token(A)
    assert (made.agent_of(first), made.agent_of(second)) == (None, A)
    made.forget(A)
    made.forget(A)
    assert (made.agent_of(second), made.agent_of(other)) == (None, B)


def test_agent_tokens_are_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("servers.tokens.AGENT_TOKENS_MAX", 2)
    made = tokens()
    issued = [made.mint_agent_token(AgentId(str(number))) for number in range(3)]
    assert [made.agent_of(token) for token in issued] == [None, "1", "2"]
    assert [made.credential_of(AgentId(str(number))) for number in range(3)] == [
        made.gateway_credential(AgentId(str(number))).encode() for number in range(3)
    ]


def test_a_gateways_credential_is_an_hmac_of_the_agents_id() -> None:
    expected = hmac.new(b"fleet-secret", b"a", hashlib.sha256).hexdigest()
    assert tokens().gateway_credential(A) == expected
    assert tokens().credential_of(A) == expected.encode()
    assert tokens().credential_of(B) != expected.encode()


def test_the_own_agents_token_is_known_as_such() -> None:
    made = tokens()
    assert not made.is_own_agent("x")
    token = made.mint_own_agent_token()
    assert made.is_own_agent(token)
    assert not made.is_own_agent(token + "x")
