"""Every setting: its default, a value that it takes, and each kind of value that it refuses."""

import ipaddress
from pathlib import Path

import pytest

from core.errors import ConfigError
from core.events import Upstream
from servers.settings import TABLE, Backend, Settings, load, parse_upstream, upstream_name, upstream_url

WRONG = {
    "ROUTER_PORT": ["eighty", "-1", "65536", "80.5", "٨٠"],
    "ROUTER_OLLAMA_PORT": ["x", "70000"],
    "HISTORY_MASK": ["a[0]", "messages]", "$"],
    "DATABASE_URL": ["mysql://x/y", "sqlite", "sqlite://"],
    "HEALTH_CHECK_INTERVAL": ["0", "-5", "soon", "nan", "inf", "10 parsecs"],
    "AGENT_TIMEOUT": ["0s", "1e400", "60x"],
    "LOAD_BALANCER_MODE": ["fastest", "metrics,auto"],
    "OLLAMA_BACKENDS": [
        "ftp://gpu1", "https://gpu1", "http://", "=http://gpu1", "a=http://gpu1;slots=0", "a=http://gpu1;slots=x", "a=http://gpu1;speed=2",
        "http://user:pw@gpu1", "http://gpu1?x=1", "http://gpu1:99999", "http://gpu1:0", "a=http://gpu1,a=http://gpu2",
        "a=http://gpu1,b=http://gpu1",
    ],
    "ROUTER_ALIASES": ["x", "=y", "a=b;a=c", "a="],
    "ROUTER_RAISE_CONTEXT": ["perhaps"],
    "ROUTER_RESUME": ["on"],
    "ROUTER_CLOUD": ["maybe"],
    "ROUTER_PRELOAD": ["2"],
    "ROUTER_NGINX_DIRECT": ["x"],
    "ROUTER_SELECTION": ["/" + "x" * 100],
    "ROUTER_TALLY": ["10.0.0.1:0", "127.0.0.1", "localhost:1", "127.0.0.1:70000"],
    "HISTORY_JSON": ["x"],
    "ROUTER_REQUIRE_GPU": ["gpu"],
    "ROUTER_AUTH": ["of", "none"],
    "ROUTER_ADMIN_TOKEN": ["short", "has a space", "tökentöken"],
    "ROUTER_JOIN_TOKEN": ["short"],
    "ROUTER_REQUIRE_API_KEY": ["x"],
    "ROUTER_QUEUE_MAX": ["0", "-1", "1.5"],
    "ROUTER_QUEUE_PER_CLIENT": ["0", "2000"],
    "ROUTER_QUEUE_TIMEOUT": ["0"],
    "ROUTER_BODY_MAX_BYTES": ["0", "1 furlong", "nanMiB"],
    "ROUTER_BODY_MEMORY_BYTES": ["-1"],
    "ROUTER_FIRST_TOKEN_TIMEOUT": ["0"],
    "ROUTER_STALL_TIMEOUT": ["never"],
    "ROUTER_ORIGINS": ["example.com"],
    "ROUTER_BASE_PATH": ["ollama", "/a//b", "/a?b", "/a b"],
    "ROUTER_AUTO_DISTRIBUTE": ["x"],
    "HISTORY_RETENTION_DAYS": ["-1", "week"],
    "HISTORY_MAX_BYTES": ["0"],
    "HISTORY_BODY_MAX_BYTES": ["x"],
    "HISTORY_BODIES": ["some"],
    "ROUTER_TLS_CERT": ["no-such-file.pem"],
    "ROUTER_TLS_KEY": ["no-such-file.pem"],
    "ROUTER_TRUSTED_PROXIES": ["proxy.example", "10.0.0.0/33", ","],
    "ROUTER_LOG_LEVEL": ["loud"],
    "ROUTER_LOG_FORMAT": ["xml"],
    "ROUTER_STOP_TIMEOUT": ["0"],
}  # fmt: skip

TAKES_ANY_TEXT = {"ROUTER_HOST", "ROUTER_DATA_DIR"}


def test_every_setting_that_can_be_wrong_is_in_the_table_of_wrong_values() -> None:
    assert {setting.name for setting in TABLE} == set(WRONG) | TAKES_ANY_TEXT


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in WRONG.items() for value in values])
def test_a_wrong_value_is_one_line_that_names_the_setting_and_what_it_takes(name: str, value: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load({name: value})
    text = str(caught.value)
    assert text.startswith(name)
    assert "\n" not in text
    if name != "ROUTER_QUEUE_PER_CLIENT" or value == "0":
        setting = next(setting for setting in TABLE if setting.name == name)
        assert setting.takes in text
        assert (value in text) == (not setting.secret) or not value.isprintable()


RIGHT: dict[str, tuple[str, str, object]] = {
    "host": ("ROUTER_HOST", "127.0.0.1", "127.0.0.1"),
    "port": ("ROUTER_PORT", "0", 0),
    "ollama_port": ("ROUTER_OLLAMA_PORT", "11434", 11434),
    "health_check_interval_s": ("HEALTH_CHECK_INTERVAL", "500ms", 0.5),
    "agent_timeout_s": ("AGENT_TIMEOUT", "2m", 120.0),
    "load_balancer_mode": ("LOAD_BALANCER_MODE", "Least-Busy", "least-busy"),
    "aliases": ("ROUTER_ALIASES", "a=b,c; d=e", (("a", ("b", "c")), ("d", ("e",)))),
    "require_gpu": ("ROUTER_REQUIRE_GPU", "No", False),
    "auth": ("ROUTER_AUTH", "required", "required"),
    "admin_token": ("ROUTER_ADMIN_TOKEN", "correct-horse", "correct-horse"),
    "queue_per_client": ("ROUTER_QUEUE_PER_CLIENT", "1024", 1024),
    "body_max_bytes": ("ROUTER_BODY_MAX_BYTES", "1.5GiB", 1_610_612_736),
    "body_memory_bytes": ("ROUTER_BODY_MEMORY_BYTES", "600mb", 600_000_000),
    "stall_timeout_s": ("ROUTER_STALL_TIMEOUT", "90", 90.0),
    "origins": ("ROUTER_ORIGINS", "https://a.example, *", ("https://a.example", "*")),
    "base_path": ("ROUTER_BASE_PATH", "/ollama/", "/ollama"),
    "trusted_proxies": ("ROUTER_TRUSTED_PROXIES", "none", ()),
    "log_level": ("ROUTER_LOG_LEVEL", "DEBUG", "debug"),
}


@pytest.mark.parametrize("field", RIGHT)
def test_a_right_value_fills_its_field(field: str) -> None:
    name, given, expected = RIGHT[field]
    assert getattr(load({name: given}), field) == expected


def test_nothing_set_is_the_defaults() -> None:
    assert load({}) == Settings()
    assert load({setting.name: "  " for setting in TABLE}) == Settings()
    assert Settings().router_config().queue_max == 1024
    assert not Settings().router_config().raise_context
    assert Settings(raise_context=True).router_config().raise_context


def test_the_queue_of_one_client_follows_a_smaller_queue() -> None:
    assert load({"ROUTER_QUEUE_MAX": "10"}).queue_per_client == 10


def test_old_names_are_taken_with_a_warning_and_new_ones_win() -> None:
    settings = load({"COORDINATOR_PORT": "9000", "NODE_TIMEOUT": "30"})
    assert (settings.port, settings.agent_timeout_s) == (9000, 30.0)
    assert [warning for warning in settings.warnings if "COORDINATOR_PORT" in warning and "ROUTER_PORT" in warning]
    both = load({"COORDINATOR_PORT": "9000", "ROUTER_PORT": "9001"})
    assert both.port == 9001
    assert "ignored" in both.warnings[0]


def test_a_setting_that_does_nothing_yet_says_so() -> None:
    assert load({"ROUTER_CLOUD": "true"}).warnings == ("ROUTER_CLOUD is set, but nothing uses it in this version",)


def test_tls_is_refused_rather_than_left_out(tmp_path: Path) -> None:
    (tmp_path / "cert.pem").touch()
    with pytest.raises(ConfigError, match="ROUTER_TLS_CERT"):
        load({"ROUTER_TLS_CERT": str(tmp_path / "cert.pem")})


# ---------------------------------------------------------------- nodes


def test_backends_by_name_by_url_and_with_slots() -> None:
    assert load({"OLLAMA_BACKENDS": "http://10.0.0.5:11434, big = http://gpu2/ollama/;slots=4 ,10.0.0.7,"}).backends == (
        Backend("10.0.0.5:11434", Upstream(host="10.0.0.5", port=11434)),
        Backend("big", Upstream(host="gpu2", port=80, base_path="/ollama"), 4),
        Backend("10.0.0.7:11434", Upstream(host="10.0.0.7", port=11434)),
    )


def test_ipv6_nodes_keep_their_brackets_in_names_and_urls() -> None:
    upstream = parse_upstream("http://[::1]:11434/x")
    assert (upstream.host, upstream_name(upstream), upstream_url(upstream)) == ("::1", "[::1]:11434/x", "http://[::1]:11434/x")


def test_trusted_proxies_may_be_networks_and_loopback() -> None:
    networks = load({"ROUTER_TRUSTED_PROXIES": "10.0.0.0/8, loopback, 192.168.1.7"}).trusted_proxies
    assert ipaddress.ip_network("10.0.0.0/8") in networks
    assert ipaddress.ip_network("::1/128") in networks
    assert ipaddress.ip_network("192.168.1.7/32") in networks


# ---------------------------------------------------------------- the file


def test_the_file_fills_what_the_environment_leaves_open(tmp_path: Path) -> None:
    file = tmp_path / "router.toml"
    file.write_text('router_port = 9000\nROUTER_AUTH = "off"\nrouter_require_gpu = false\nOLLAMA_BACKENDS = ["a=http://x", "b=http://y"]\n')
    settings = load({"OLLAMA_ROUTER_CONFIG": str(file), "ROUTER_AUTH": "required"})
    assert (settings.port, settings.auth, settings.require_gpu) == (9000, "required", False)
    assert [backend.name for backend in settings.backends] == ["a", "b"]
    assert load({"OLLAMA_ROUTER_CONFIG": "nowhere.toml"}, config_file=file).port == 9000


@pytest.mark.parametrize(
    ("text", "about"),
    [
        ("router_prt = 1", "'router_prt'"),
        ("router_port = 'x'", "ROUTER_PORT"),
        ("router_port = [1]", "'router_port'"),
        ("router_port = {a = 1}", "'router_port'"),
        ("[router]\nport = 1", "'router'"),
        ("router_port = ", "not valid TOML"),
    ],
)
def test_a_file_that_cannot_be_used_is_one_line(tmp_path: Path, text: str, about: str) -> None:
    file = tmp_path / "router.toml"
    file.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load({}, config_file=file)
    assert about in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_that_is_not_there_or_too_large_or_not_text(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        load({}, config_file=tmp_path / "none.toml")
    (tmp_path / "large.toml").write_bytes(b"#" * ((1 << 20) + 1))
    with pytest.raises(ConfigError, match="larger"):
        load({}, config_file=tmp_path / "large.toml")
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="not valid TOML"):
        load({}, config_file=tmp_path / "binary.toml")
