"""Origins as Ollama judges them, and what is taken off a path."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge.front import Front, Origins
from edge.wire_heads import RequestHead, parse_request_head


def head(method: str = "GET", path: str = "/api/tags", *lines: str) -> RequestHead:
    return parse_request_head("\r\n".join([f"{method} {path} HTTP/1.1", "Host: router:8080", *lines, "", ""]).encode())


@pytest.mark.parametrize(
    "origin",
    ["http://localhost", "https://localhost:3000", "http://127.0.0.1:5173", "https://0.0.0.0", "app://obsidian.md", "file://", "tauri://localhost",
     "vscode-webview://1ab2", "vscode-file://vscode-app", "HTTP://LOCALHOST:1"],
)  # fmt: skip
def test_ollamas_own_list(origin: str) -> None:
    assert Origins().allow(origin.encode())


@pytest.mark.parametrize(
    "origin",
    ["https://example.com", "http://localhostile.example", "http://localhost.example", "null", "ftp://localhost", "http://127.0.0.10"],
)
def test_strangers(origin: str) -> None:
    assert not Origins().allow(origin.encode())


def test_more_origins_and_all_of_them() -> None:
    more = Origins(("https://chat.example", "https://*.corp.example"))
    assert more.allow(b"https://chat.example")
    assert more.allow(b"https://a.corp.example")
    assert more.allow(b"http://localhost")
    assert not more.allow(b"https://chat.example.evil")
    assert not more.any
    assert Origins(("*",)).allow(b"https://anybody.example")


@given(st.text(alphabet="ab*", max_size=6).filter(lambda text: text.count("*") == 1), st.text(alphabet="ab", max_size=6))
def test_a_pattern_matches_what_begins_and_ends_like_it(pattern: str, origin: str) -> None:
    begin, end = pattern.split("*")
    expected = any(begin + middle + end == origin for middle in [origin[len(begin) : len(origin) - len(end)]])
    assert Origins((f"x://{pattern}",)).allow(f"x://{origin}".encode()) is expected


# ---------------------------------------------------------------- answers


def test_one_of_its_own_pages_is_let_alone() -> None:
    for scheme in ("http", "https"):
        own = head("POST", "/api/chat", f"Origin: {scheme}://router:8080")
        assert Front().answer(own, "id", keep_alive=True) is None
        assert Front().stamp(own) == b""


def test_a_stranger_gets_a_bare_403_whatever_he_asks() -> None:
    front = Front(methods={"/api/chat": ("POST",)})
    for method in ("GET", "POST", "OPTIONS"):
        strange = head(method, "/api/chat", "Origin: https://example.com")
        allow = b"Allow: POST\r\n" if method == "OPTIONS" else b""
        expected = b"HTTP/1.1 403 Forbidden\r\nX-Request-Id: id\r\n" + allow + b"Content-Length: 0\r\n\r\n"
        assert front.answer(strange, "id", keep_alive=True) == expected
        assert front.stamp(strange) == b""


def test_a_preflight_is_answered_as_recorded() -> None:
    front = Front(methods={"/api/chat": ("POST",)})
    asked = head("OPTIONS", "/api/chat", "Origin: http://localhost:3000", "Access-Control-Request-Method: POST")
    answer = front.answer(asked, "id", keep_alive=True)
    assert answer is not None
    first, *lines = (answer.replace(b"\r\n\r\n", front.stamp(asked), 1)).decode().split("\r\n")
    recorded = {
        "Access-Control-Allow-Headers: Authorization,Content-Type,User-Agent,Accept,X-Requested-With,Openai-Beta,X-Stainless-Arch,"
        "X-Stainless-Async,X-Stainless-Custom-Poll-Interval,X-Stainless-Helper-Method,X-Stainless-Lang,X-Stainless-Os,"
        "X-Stainless-Package-Version,X-Stainless-Poll-Helper,X-Stainless-Retry-Count,X-Stainless-Runtime,X-Stainless-Runtime-Version,"
        "X-Stainless-Timeout",
        "Access-Control-Allow-Methods: GET,POST,PUT,PATCH,DELETE,HEAD,OPTIONS",
        "Access-Control-Allow-Origin: http://localhost:3000",
        "Access-Control-Max-Age: 43200",
        "Allow: POST",
        "Vary: Origin",
        "Vary: Access-Control-Request-Method",
        "Vary: Access-Control-Request-Headers",
    }
    assert first == "HTTP/1.1 204 No Content"
    assert set(lines) - {"X-Request-Id: id"} == recorded
    assert len(lines) == len(recorded) + 1


def test_a_star_opens_to_everybody_without_naming_him() -> None:
    front = Front(origins=("*",))
    anybody = head("OPTIONS", "/nowhere", "Origin: https://example.com")
    assert front.stamp(anybody) == b"\r\nAccess-Control-Allow-Origin: *"
    answer = front.answer(anybody, "id", keep_alive=False)
    assert answer is not None
    assert b"Vary" not in answer
    assert b"Allow:" not in answer.replace(b"-Allow", b"")
    assert b"Connection: close" in answer
    assert front.answer(head("GET", "/api/tags", "Origin: https://example.com"), "id", keep_alive=True) is None


# ---------------------------------------------------------------- prefixes


@pytest.mark.parametrize(
    ("path", "plain", "taken", "credential"),
    [
        ("/k/abc-1/api/chat", "/api/chat", "/k/abc-1", "Bearer abc-1"),
        ("/k/abc", "/", "/k/abc", "Bearer abc"),
        ("/k/abc/", "/", "/k/abc", "Bearer abc"),
        ("/ollama/api/tags?a=b", "/api/tags", "/ollama", None),
        ("/ollama", "/", "/ollama", None),
        ("/ollama/k/abc/v1/models", "/v1/models", "/ollama/k/abc", "Bearer abc"),
        ("/ollamas/api/tags", "/ollamas/api/tags", "", None),
        ("/k/a%20b/api/chat", "/k/a b/api/chat", "", None),
        ("/k//api/chat", "/k//api/chat", "", None),
        ("/k/abc/../api/chat", "/k/abc/../api/chat", "", None),
        ("/api/tags", "/api/tags", "", None),
    ],
)
def test_what_is_taken_off(path: str, plain: str, taken: str, credential: str | None) -> None:
    asked = head("POST", path)
    assert Front(base_path="/ollama").strip(asked) == taken.encode()
    assert asked.path == plain
    assert asked.fields.get(b"authorization") == (credential.encode() if credential else None)
    if taken:
        assert asked.target.partition(b"?")[0] == plain.encode()
        assert asked.target.partition(b"?")[2] == asked.query


def test_a_key_in_the_path_stands_for_every_other_credential() -> None:
    lines = ("Authorization: Bearer other", "X-API-Key: third", "Accept: */*")
    asked, untouched = head("GET", "/k/mine/api/tags", *lines), head("GET", "/api/tags", *lines)
    Front().strip(asked)
    assert asked.headers == [(b"Host", b"router:8080"), (b"Accept", b"*/*"), (b"Authorization", b"Bearer mine")]
    assert b"x-api-key" not in asked.fields
    assert untouched.fields[b"authorization"] == b"Bearer other"
