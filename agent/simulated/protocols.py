"""The protocols of the inference routes: how each one's requests are read, its errors wrapped and its answers written.

Decides nothing itself: a table. Never knows when anything is sent.
"""

from collections.abc import Callable, Sequence
from typing import Any, Final, NamedTuple, Protocol

from agent.simulated import anthropic, audio, native, openai, responses
from agent.simulated.answers import Piece
from agent.simulated.asking import Ask, Finder, ask_chat, ask_embed, ask_embeddings, ask_generate
from agent.simulated.models import Knobs
from agent.simulated.native import Figures, NativeWriter, Wall
from agent.simulated.openai import OpenAIWriter, TranslationError
from agent.simulated.reading import Refusal, read_request
from agent.simulated.wire import Header, Request

STREAM_HEADERS: Final[tuple[Header, ...]] = ((b"Cache-Control", b"no-cache"), (b"Connection", b"keep-alive"))
"""What two of the protocols say of a stream, failed or not."""


class Writer(Protocol):
    """Writes the answers of one request. What is one write is one chunk."""

    stream_type: str
    whole_type: str

    def piece(self, piece: Piece) -> list[bytes]: ...
    def last(self, pieces: Sequence[Piece], reason: str, figures: Figures) -> list[bytes]: ...
    def whole(self, pieces: Sequence[Piece], reason: str, figures: Figures) -> bytes: ...
    def unfinished(self, pieces: Sequence[Piece]) -> bytes: ...
    def loaded(self, reason: str) -> bytes: ...
    def rendered(self) -> bytes: ...
    def stream_error(self, text: str) -> list[bytes]: ...


class RouteProtocol(NamedTuple):
    """One inference route."""

    read: Callable[[Request], dict[str, Any]]
    ask: Callable[[dict[str, Any], Finder, Knobs], Ask]
    writer: Callable[[Ask, Wall], Writer]
    refused: Callable[[Refusal | TranslationError, Wall], tuple[str, bytes]]
    stream_headers: tuple[Header, ...] = ()


def plain(refusal: Refusal | TranslationError) -> Refusal:
    """The refusal, whoever found it."""
    return refusal.refusal if isinstance(refusal, TranslationError) else refusal


def _native(struct: str, ask: Callable[[dict[str, Any], Finder, Knobs], Ask], *, chat: bool = False) -> RouteProtocol:
    return RouteProtocol(
        read=lambda request: read_request(bytes(request.body), struct),
        ask=ask,
        writer=lambda ask, wall: NativeWriter(ask, wall, chat=chat),
        refused=lambda refusal, wall: native.refused(plain(refusal), stream=False),
    )


def _translating(struct: str) -> Callable[[Request], dict[str, Any]]:
    def read(request: Request) -> dict[str, Any]:
        try:
            return read_request(bytes(request.body), struct)
        except Refusal as refusal:
            raise TranslationError("EOF" if refusal.text == "missing request body" else refusal.text, refusal.status) from None

    return read


def _openai(struct: str, ask: Callable[[dict[str, Any], Finder, Knobs], Ask], *, chat: bool = False) -> RouteProtocol:
    return RouteProtocol(_translating(struct), ask, lambda ask, wall: OpenAIWriter(ask, wall, chat=chat), openai.refused)


PROTOCOLS: Final[dict[str, RouteProtocol]] = {
    "/api/generate": _native("GenerateRequest", ask_generate),
    "/api/chat": _native("ChatRequest", ask_chat, chat=True),
    "/api/embed": _native("EmbedRequest", ask_embed),
    "/api/embeddings": _native("EmbeddingRequest", ask_embeddings),
    "/v1/chat/completions": _openai("ChatCompletionRequest", openai.ask_chat_completion, chat=True),
    "/v1/completions": _openai("CompletionRequest", openai.ask_completion),
    "/v1/embeddings": _openai("OpenAIEmbedRequest", openai.ask_embedding),
    "/v1/responses": RouteProtocol(
        _translating("ResponsesRequest"), responses.ask_response, responses.ResponsesWriter, openai.refused, STREAM_HEADERS
    ),
    "/v1/messages": RouteProtocol(
        _translating("MessagesRequest"), anthropic.ask_message, anthropic.AnthropicWriter, anthropic.refused, STREAM_HEADERS
    ),
    "/v1/audio/transcriptions": RouteProtocol(
        lambda request: audio.read_form(bytes(request.body), request.fields.get(b"content-type", b"")),
        audio.ask_transcription,
        audio.TranscriptionWriter,
        openai.refused,
    ),
}
