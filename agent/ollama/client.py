"""Questions to one Ollama: its version, what it holds, what is loaded.

Decides only what counts as an answer. Rows are handed on as Ollama wrote them. Never goes through a proxy.
"""

from typing import Any, Final

import httpx
import msgspec

ANSWER_MAX_BYTES: Final = 64 << 20
"""Larger lists are not believed (3,000 models make about 2 MB)."""

LOADED_TIMEOUT_S: Final = 60.0
"""`/api/ps` may stand still for 20 s and more while a model is loaded or unloaded."""


class OllamaSilent(Exception):
    """No usable answer. `refused`: nobody listens there."""

    def __init__(self, text: str, *, refused: bool = False) -> None:
        super().__init__(text)
        self.refused = refused


class OllamaClient:
    """One Ollama at `base_url`. Use as an async context manager."""

    def __init__(self, base_url: str, *, timeout_s: float = 5.0) -> None:
        self._base_url = base_url
        self._http = httpx.AsyncClient(timeout=timeout_s, trust_env=False, follow_redirects=False)

    async def __aenter__(self) -> "OllamaClient":
        await self._http.__aenter__()
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self._http.aclose()

    async def version(self) -> str:
        """Its version, such as `0.33.0`.

        Raises:
            OllamaSilent: no usable answer.
        """
        version = (await self._get("/api/version")).get("version")
        if not isinstance(version, str):
            raise OllamaSilent(f"{self._base_url}/api/version names no version: that is no Ollama")
        return version[:100]

    async def installed(self) -> list[Any]:
        """The rows of `/api/tags`.

        Raises:
            OllamaSilent: no usable answer.
        """
        return _rows(await self._get("/api/tags"))

    async def loaded(self) -> list[Any]:
        """The rows of `/api/ps`. May be slow; that means nothing.

        Raises:
            OllamaSilent: no usable answer.
        """
        return _rows(await self._get("/api/ps", timeout_s=LOADED_TIMEOUT_S))

    async def _get(self, path: str, *, timeout_s: float | None = None) -> dict[str, Any]:
        timeout = httpx.USE_CLIENT_DEFAULT if timeout_s is None else httpx.Timeout(timeout_s, connect=5.0)
        body = bytearray()
        try:
            async with self._http.stream("GET", self._base_url + path, timeout=timeout) as response:
                async for chunk in response.aiter_bytes():
                    body += chunk
                    if len(body) > ANSWER_MAX_BYTES:
                        raise OllamaSilent(f"the answer to {path} is larger than {ANSWER_MAX_BYTES >> 20} MiB")
        except httpx.ConnectError as error:
            raise OllamaSilent(f"nothing answers at {self._base_url}: {error}", refused=True) from None
        except httpx.TimeoutException:
            raise OllamaSilent(f"no answer to {path} in time") from None
        except httpx.HTTPError as error:
            raise OllamaSilent(f"no answer to {path}: {error or type(error).__name__}") from None
        if response.status_code != 200:
            raise OllamaSilent(f"{path} was answered with {response.status_code}")
        try:
            return msgspec.json.decode(body, type=dict[str, Any])
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            raise OllamaSilent(f"the answer to {path} is not JSON") from None


def _rows(answer: dict[str, Any]) -> list[Any]:
    rows = answer.get("models")
    return rows if isinstance(rows, list) else []
