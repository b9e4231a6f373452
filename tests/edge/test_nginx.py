"""Rendering: what depends on the machine and on the coordinator, and what no configuration may hold."""

import hashlib
import os
import re
import stat
from pathlib import Path

import pytest

from core.errors import ConfigError
from edge import nginx as files
from edge.nginx import Facts, Nginx, Node, Options, render, understand
from tests.edge.nginx_stage import installed

DEBIAN = "nginx version: nginx/1.22.1\nconfigure arguments: --modules-path=/usr/lib/nginx/modules"
WITH_TLS = " --with-http_ssl_module --with-http_v2_module"
OLD = Nginx(program="nginx", version=(1, 22, 1))
NEW = Nginx(program="nginx", version=(1, 27, 4))


def node(host: str = "10.0.0.1", port: int = 11434) -> Node:
    return Node(group="n_" + hashlib.sha1(f"{host}:{port}".encode()).hexdigest()[:12], host=host, port=port)


def facts(*nodes: Node, secret: str = "s" * 32, coordinator: str = "127.0.0.1:8080", tally: str | None = "127.0.0.1:9000") -> Facts:
    return Facts(secret=secret, coordinator=coordinator, tally=tally, nodes=nodes)


def options(place: Path, **more: object) -> Options:
    made: dict[str, object] = {"selection": place / "selection.sock", "listen": ("127.0.0.1:8081",), "directory": place}
    return Options(**{**made, **more})  # type: ignore[arg-type]


def directives(text: str, name: str) -> list[str]:
    """The arguments of every directive of this name."""
    return [match.strip() for match in re.findall(rf"^\s*{name}\s+([^;]*);", text, re.MULTILINE)]


# ---------------------------------------------------------------- which nginx


def test_debians_nginx_is_understood() -> None:
    found = understand("nginx", DEBIAN)
    assert found.version == (1, 22, 1)
    assert found.version_text == "1.22.1"
    assert understand("nginx", DEBIAN + WITH_TLS, tls=True) == found


@pytest.mark.parametrize(
    ("told", "tls", "said"),
    [
        ("nonsense", False, "does not tell its version"),
        (DEBIAN, True, "without ssl_module; install Debian's .apt-get install nginx-light"),
        (f"{DEBIAN} --with-http_ssl_module", True, "without v2_module"),
        (f"{DEBIAN} --without-http_map_module", False, "without map_module"),
    ],
)
def test_what_is_missing_is_named_with_what_to_do(told: str, tls: bool, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        understand("nginx", told, tls=tls)


def test_no_nginx_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files.shutil, "which", lambda *_, **__: None)
    with pytest.raises(ConfigError, match="nginx is not installed: apt-get install"):
        files.look()


# ---------------------------------------------------------------- what an operator chooses


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"listen": ("80",)}, "--listen takes ADDRESS:PORT"),
        ({"listen": ("127.0.0.1:0",)}, "--listen takes ADDRESS:PORT"),
        ({"listen": ("127.0.0.1:80; include /x",)}, "--listen takes ADDRESS:PORT"),
        ({"selection": Path("/run/a$b")}, "cannot hold"),
        ({"directory": Path('/run/a"b')}, "cannot hold"),
        ({"selection": Path("/run/" + "a" * 120)}, "longer than 107 bytes"),
        ({"tls_cert": Path("/run")}, "belong together"),
        ({"tls_cert": Path("/nowhere.pem"), "tls_key": Path("/nowhere.key")}, "/nowhere.pem is not there"),
    ],
)
def test_what_cannot_be_used_is_said_in_one_sentence(tmp_path: Path, more: dict[str, object], said: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(said)) as error:
        options(tmp_path, **more)
    assert "\n" not in str(error.value)


# ---------------------------------------------------------------- the files


def test_the_same_facts_give_the_same_files_whatever_the_order_of_the_nodes(tmp_path: Path) -> None:
    one, two = node(), node("10.0.0.2")
    assert render(options(tmp_path), OLD, facts(one, two)) == render(options(tmp_path), OLD, facts(two, one))


def test_nothing_is_left_to_fill_in(tmp_path: Path) -> None:
    for name, text in render(options(tmp_path), OLD, facts(node())).items():
        assert "{{" not in text, name


def test_every_node_has_a_group_with_kept_connections_and_is_found_by_its_address(tmp_path: Path) -> None:
    nodes = [node(), node("::1", 11500), node("10.0.0.2")]
    text = render(options(tmp_path), OLD, facts(*nodes))["upstreams.conf"]
    for one, address in zip(nodes, ("10.0.0.1:11434", "[::1]:11500", "10.0.0.2:11434"), strict=True):
        assert f"upstream {one.group} {{\n    server {address};" in text
        assert f"    {address} {one.group};" in text
    assert text.count("keepalive 64;") == len(nodes) + 2
    assert text.count("default $router_upstream;") == 1, "a node without a group is reached by its raw address"


@pytest.mark.parametrize(
    "odd",
    [
        Node(group="n_0123456789ab", host="gpu-box", port=1),
        Node(group="n_0123456789ab;", host="10.0.0.1", port=1),
        Node(group="n_0123456789ab", host="10.0.0.1", port=0),
        Node(group="n_0123456789ab", host="x;}", port=1),
        Node(group="n_0123456789ab", host="unix:/run/x", port=1),
    ],
)
def test_a_node_that_no_configuration_can_hold_is_left_out(tmp_path: Path, odd: Node) -> None:
    text = render(options(tmp_path), OLD, facts(odd))["upstreams.conf"]
    assert "n_0123456789ab" not in text


@pytest.mark.parametrize(
    "wrong", [facts(secret="short"), facts(secret="x" * 20 + "; include /etc/passwd"), facts(coordinator="x y"), facts(tally="1.2.3.4;")]
)
def test_a_coordinator_that_says_odd_things_is_not_believed(tmp_path: Path, wrong: Facts) -> None:
    with pytest.raises(ConfigError, match="fit together"):
        render(options(tmp_path), OLD, wrong)


def test_http2_is_asked_for_in_the_manner_of_the_version(tmp_path: Path) -> None:
    cert, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    cert.touch()
    key.touch()
    chosen = options(tmp_path, tls_cert=cert, tls_key=key)
    old, new = (render(chosen, nginx, facts())[files.CONFIG] for nginx in (OLD, NEW))
    assert directives(old, "listen")[0].endswith(" ssl http2")
    assert directives(old, "http2") == []
    assert directives(new, "listen")[0].endswith(" ssl")
    assert directives(new, "http2") == ["on"]
    for text in (old, new):
        assert directives(text, "ssl_certificate") == [f'"{cert}"']
    plain = render(options(tmp_path), NEW, facts())[files.CONFIG]
    assert "ssl" not in " ".join(directives(plain, "listen"))
    assert directives(plain, "ssl_certificate") == []


def test_several_addresses_are_listened_on(tmp_path: Path) -> None:
    text = render(options(tmp_path, listen=("127.0.0.1:81", "[::1]:82")), OLD, facts())[files.CONFIG]
    assert [value.split()[0] for value in directives(text, "listen")] == ["127.0.0.1:81", "[::1]:82"]


def test_every_error_of_a_node_goes_to_the_coordinator(tmp_path: Path) -> None:
    text = render(options(tmp_path), OLD, facts())[files.CONFIG]
    (listed,) = [value for value in directives(text, "error_page") if value.startswith("400 401 ")]
    statuses = {int(word) for word in listed.split() if word.isdigit()}
    assert statuses == set(range(400, 600)) - {499}, "499 is a client that left: nobody is to go on for it"
    assert listed.endswith("= @coordinator")


def test_silence_is_never_a_timeout_and_nothing_is_tried_twice(tmp_path: Path) -> None:
    text = render(options(tmp_path), OLD, facts())[files.CONFIG]
    assert directives(text, "proxy_read_timeout") == ["365d"]
    assert directives(text, "proxy_next_upstream") == ["off"]
    assert directives(text, "proxy_socket_keepalive") == ["on"]
    assert directives(text, "proxy_buffering") == ["off"]
    assert directives(text, "worker_shutdown_timeout") == [], "a reload would cut streams"
    assert directives(text, "proxy_ignore_client_abort") == [], "a client that leaves ends its node's work"


def test_the_log_is_a_datagram_to_the_coordinator_or_nothing(tmp_path: Path) -> None:
    told = render(options(tmp_path), OLD, facts())[files.CONFIG]
    line = "syslog:server=127.0.0.1:9000,tag=router,nohostname router_tally"
    assert directives(told, "access_log") == ["off", f"{line} if=$router_lease", f"{line} if=$router_left"]
    assert directives(told, "error_log") == ["stderr error", "syslog:server=127.0.0.1:9000,tag=cut,nohostname error"]
    untold = render(options(tmp_path), OLD, facts(tally=None))[files.CONFIG]
    assert (directives(untold, "access_log"), directives(untold, "error_log")) == (["off"], ["stderr error"])


def test_every_directive_for_all_requests_says_why() -> None:
    """On its own line, or with its neighbours below one sentence."""
    text = (files.TEMPLATES / files.CONFIG).read_text(encoding="utf-8")
    head = text[text.index("http {") + 6 : text.index("map ")]
    for paragraph in head.strip().split("\n\n"):
        lines = paragraph.strip().splitlines()
        bare = [line for line in lines if ";" in line and "#" not in line]
        assert lines[0].lstrip().startswith("#") or len(bare) <= 2, bare  # what a name says needs no words


def test_workers_may_use_the_socket_of_the_coordinators_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    socket = tmp_path / "selection.sock"
    socket.touch()
    monkeypatch.setattr(files.os, "geteuid", lambda: 0)
    owner = files.pwd.getpwuid(socket.stat().st_uid).pw_name
    assert directives(render(options(tmp_path), OLD, facts())[files.CONFIG], "user") == [owner]
    monkeypatch.setattr(files.os, "geteuid", lambda: 1000)
    assert directives(render(options(tmp_path), OLD, facts())[files.CONFIG], "user") == []


def test_the_unit_starts_what_was_asked_for(tmp_path: Path) -> None:
    text = render(options(tmp_path, stop_within_s=90), OLD, facts(), run="/x/python -m edge run --listen 1.2.3.4:80")[files.UNIT]
    assert "ExecStart=/x/python -m edge run --listen 1.2.3.4:80\n" in text
    assert "TimeoutStopSec=95\n" in text, "a little longer than streams get"


def test_files_are_their_owners_alone_and_replaced_whole(tmp_path: Path) -> None:
    place = tmp_path / "new" / "nginx"
    files.write(place, {"a.conf": "one"})
    files.write(place, {"a.conf": "two"})
    assert [path.name for path in place.iterdir()] == ["a.conf"]
    assert (place / "a.conf").read_text() == "two"
    assert stat.S_IMODE((place / "a.conf").stat().st_mode) == 0o600


def test_a_directory_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="--dir: "):
        files.write(tmp_path / "file" / "below", {"a": "b"})


# ---------------------------------------------------------------- the real nginx


@pytest.mark.slow
@pytest.mark.parametrize("count", [0, 1, 1000])
def test_nginx_takes_the_files(tmp_path: Path, count: int) -> None:
    nginx = installed()
    nodes = [node(f"10.0.{number // 250}.{number % 250 + 1}") for number in range(count)]
    files.write(tmp_path, render(options(tmp_path), nginx, facts(*nodes, node("::1"))))
    assert files.test(nginx, tmp_path) == ""


@pytest.mark.slow
def test_what_nginx_says_against_the_files_is_one_line(tmp_path: Path) -> None:
    nginx = installed()
    files.write(tmp_path, {**render(options(tmp_path), nginx, facts()), "upstreams.conf": "nonsense;"})
    said = files.test(nginx, tmp_path)
    assert 'unknown directive "nonsense"' in said
    assert "\n" not in said
    assert os.fspath(tmp_path) in said
