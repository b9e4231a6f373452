"""An agent's settings: what wins, what is refused in which words, and what it remembers."""

import json
import stat
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent import config
from agent.config import AgentConfig
from core.errors import ConfigError

WRONG = {
    "ROUTER_URL": ["ftp://x", "http://", "http://x:99999", "http://x?y", "http://a b", "http://user@x", "http://x:0"],
    "OLLAMA_PORT": ["x", "0", "65536", "-1", "1e3", "\u0661", "9" * 5000],
    "OLLAMA_API_BASE": ["https://x", "unix:///x", ":80"],
    "AGENT_API_PORT": ["-1", "65536", "port"],
    "AGENT_ADVERTISE_ADDRESS": ["a b", "h\u00e4user"],
    "AGENT_HEARTBEAT_INTERVAL_SECS": ["0", "301", "nan", "inf", "ten", "-5"],
    "AGENT_STOP_TIMEOUT_SECS": ["-1", "soon"],
    "ROUTER_JOIN_TOKEN": ["two words", "\u2603"],
    "OLLAMA_GPU_AVAILABLE": ["maybe", "2"],
    "OLLAMA_GPU_COUNT": ["-1", "1.5", "1025"],
    "OLLAMA_GPU_MEMORY_GB": ["0", "lots", "nan"],
    "OLLAMA_NUM_PARALLEL": ["-1", "many"],
    "ROUTER_LOG_LEVEL": ["loud"],
    "ROUTER_LOG_FORMAT": ["xml"],
}  # fmt: skip


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return tmp_path


def test_defaults(home: Path) -> None:
    found = config.load({}, home=home)
    assert found == AgentConfig(data_dir=home / ".ollama-agent")
    assert (found.router_url, found.ollama_port, found.ollama_url, found.api_port) == (
        "http://localhost:8080", 11434, "http://127.0.0.1:11434", 11435,
    )  # fmt: skip


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in WRONG.items() for value in values])
def test_a_wrong_value_is_one_line_that_names_the_setting_and_what_it_takes(name: str, value: str, home: Path) -> None:
    with pytest.raises(ConfigError) as refused:
        config.load({name: value}, home=home)
    text = str(refused.value)
    assert text.startswith(f"{name} takes {config.TABLE[name].takes}")
    assert "\n" not in text
    assert len(text) < 300
    if name == "ROUTER_JOIN_TOKEN":
        assert value not in text


def test_every_setting_with_a_form_has_a_wrong_value_here() -> None:
    assert set(config.TABLE) - set(WRONG) == {"AGENT_DATA_DIR", "OLLAMA_GPU_MODEL"}


def test_everything_can_be_set(home: Path) -> None:
    environ = {
        "ROUTER_URL": "https://router.lan/base/",
        "OLLAMA_PORT": "12000",
        "OLLAMA_API_BASE": "http://10.0.0.7:11500/",
        "AGENT_API_PORT": "0",
        "AGENT_ADVERTISE_ADDRESS": "10.0.0.9",
        "AGENT_HEARTBEAT_INTERVAL_SECS": "2.5",
        "AGENT_STOP_TIMEOUT_SECS": "5",
        "AGENT_DATA_DIR": str(home / "x"),
        "ROUTER_JOIN_TOKEN": "join-me",
        "OLLAMA_GPU_AVAILABLE": "Yes",
        "OLLAMA_GPU_MODEL": " RTX 4090 ",
        "OLLAMA_GPU_COUNT": "2",
        "OLLAMA_GPU_MEMORY_GB": "24",
        "OLLAMA_NUM_PARALLEL": "4",
        "ROUTER_LOG_LEVEL": "DEBUG",
        "ROUTER_LOG_FORMAT": "json",
    }
    assert set(environ) == set(config.TABLE)
    assert config.load(environ, home=home) == AgentConfig(
        router_url="https://router.lan/base",
        ollama_port=12000,
        ollama_url="http://10.0.0.7:11500",
        api_port=0,
        advertise_address="10.0.0.9",
        heartbeat_interval_s=2.5,
        join_token="join-me",
        gpu=config.GpuOverride(available=True, model="RTX 4090", count=2, memory_bytes=24 << 30),
        slots=4,
        data_dir=home / "x",
        stop_timeout_s=5,
        log_level="debug",
        log_format="json",
    )


@pytest.mark.parametrize(
    ("environ", "url", "port", "api_port"),
    [
        ({"OLLAMA_PORT": "12000"}, "http://127.0.0.1:12000", 12000, 12001),
        ({"OLLAMA_API_BASE": "localhost:12000"}, "http://localhost:12000", 12000, 12001),
        ({"OLLAMA_API_BASE": "http://box"}, "http://box", 80, 81),
        ({"OLLAMA_PORT": "65535"}, "http://127.0.0.1:65535", 65535, 1),
    ],
)
def test_where_ollama_is(environ: dict[str, str], url: str, port: int, api_port: int, home: Path) -> None:
    found = config.load(environ, home=home)
    assert (found.ollama_url, found.ollama_port, found.api_port) == (url, port, api_port)


def test_an_old_name_is_taken_with_a_warning_and_the_new_one_wins(home: Path) -> None:
    found = config.load({"COORDINATOR_URL": "http://old:1"}, home=home)
    assert found.router_url == "http://old:1"
    assert found.warnings == ("COORDINATOR_URL is the old name of ROUTER_URL: please use ROUTER_URL",)
    found = config.load({"COORDINATOR_URL": "http://old:1", "ROUTER_URL": "http://new:2"}, home=home)
    assert (found.router_url, found.warnings) == ("http://new:2", ())
    with pytest.raises(ConfigError, match="COORDINATOR_URL takes"):
        config.load({"COORDINATOR_URL": "gopher://old"}, home=home)


def test_blank_is_not_set(home: Path) -> None:
    assert config.load({"ROUTER_URL": "  ", "OLLAMA_NUM_PARALLEL": ""}, home=home) == AgentConfig(data_dir=home / ".ollama-agent")
    assert config.load({"OLLAMA_NUM_PARALLEL": "0"}, home=home).slots is None, "Ollama's word for its own choice"


# ---------------------------------------------------------------- saved settings


def save(home: Path, text: str) -> None:
    (home / ".ollama-agent").mkdir(exist_ok=True)
    (home / ".ollama-agent" / "settings.json").write_text(text)


def test_environment_over_saved_over_default(home: Path) -> None:
    save(home, '{"ROUTER_URL": "http://saved:1", "OLLAMA_PORT": 12000, "AGENT_HEARTBEAT_INTERVAL_SECS": null, "OTHER": 1}')
    found = config.load({"ROUTER_URL": "http://env:2"}, home=home)
    assert (found.router_url, found.ollama_port, found.heartbeat_interval_s) == ("http://env:2", 12000, 10.0)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("{", "not valid JSON"),
        ("[1]", "must hold a JSON object"),
        ('{"OLLAMA_PORT": "x"}', "OLLAMA_PORT in "),
        ("[" * 100_000, "not valid JSON"),
    ],
)
def test_a_broken_file_is_named(home: Path, text: str, told: str) -> None:
    save(home, text)
    with pytest.raises(ConfigError, match=told) as refused:
        config.load({}, home=home)
    assert "settings.json" in str(refused.value)


def test_a_directory_that_cannot_be_used_is_told(home: Path) -> None:
    (home / "file").write_text("")
    with pytest.raises(ConfigError, match="AGENT_DATA_DIR names another"):
        config.load({"AGENT_DATA_DIR": str(home / "file")}, home=home)
    with pytest.raises(ConfigError, match="cannot be written"):
        config._write_json(home / "file" / "x.json", {})


# ---------------------------------------------------------------- identity


def test_an_agent_stays_itself_and_its_boots_grow(home: Path) -> None:
    mine = config.load({}, home=home)
    first = config.take_identity(mine, unix_ms=1000)
    second = config.take_identity(mine, unix_ms=5000)
    turned_back = config.take_identity(mine, unix_ms=17)
    assert {first.instance_id, second.instance_id, turned_back.instance_id} == {first.instance_id}
    assert (first.boot, second.boot, turned_back.boot) == (1000, 5000, 5001)
    (file,) = (home / ".ollama-agent").iterdir()
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert json.loads(file.read_text()) == {"instance_id": first.instance_id, "boot": 5001}


def test_two_ollamas_are_two_agents(home: Path) -> None:
    mine = config.load({}, home=home)
    other = config.load({"OLLAMA_PORT": "12000"}, home=home)
    elsewhere = config.load({"OLLAMA_API_BASE": "http://[fe80::1%25eth0]:11434"}, home=home)
    assert len({config.take_identity(each, unix_ms=1).instance_id for each in (mine, other, elsewhere)}) == 3


@pytest.mark.parametrize("saved", ['{"instance_id": "me", "boot": "x"}', '{"instance_id": 5}', "{}"])
def test_a_strange_identity_is_replaced(home: Path, saved: str) -> None:
    mine = config.load({}, home=home)
    config.take_identity(mine, unix_ms=1)
    (file,) = (home / ".ollama-agent").iterdir()
    file.write_text(saved)
    assert len(config.take_identity(mine, unix_ms=9).instance_id) == 36
    assert config.take_identity(mine, unix_ms=9).boot == 10


@given(st.dictionaries(st.sampled_from(sorted(config.TABLE)), st.text(max_size=20), max_size=4))
def test_any_environment_is_a_configuration_or_one_line(environ: dict[str, str]) -> None:
    environ.pop("AGENT_DATA_DIR", None)
    try:
        found = config.load(environ, home=Path("/nonexistent"))
    except ConfigError as error:
        told = str(error)
        assert told.count("\n") == 0
        assert any(name in told for name in environ)
    else:
        assert 1 <= found.ollama_port <= 65535
