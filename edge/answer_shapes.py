"""The shapes of nodes' answers, as far as `edge.verdicts` asks: what msgspec decodes, and what is odd about it.

Decides nothing. Apart from the judgements because it is never compiled (`native`): there a structure's fields have plain defaults only.
"""

from typing import Final

import msgspec

from core.events import Route, Usage

NO_TIME: Final = "0001-01-01T00:00:00Z"
_ZERO_TIME: Final = -62_135_596_800


class _NativeCounts(msgspec.Struct, gc=False):
    prompt_eval_count: int = 0
    eval_count: int = 0
    total_duration: int = 0
    load_duration: int = 0
    prompt_eval_duration: int = 0
    eval_duration: int = 0

    def usage(self) -> Usage | None:
        if not (self.prompt_eval_count or self.eval_count or self.total_duration):
            return None
        return Usage(
            prompt_tokens=self.prompt_eval_count,
            output_tokens=self.eval_count,
            total_ns=self.total_duration,
            load_ns=self.load_duration,
            prompt_ns=self.prompt_eval_duration,
            eval_ns=self.eval_duration,
        )


class _NativeWhole(_NativeCounts, gc=False):
    """All that is asked of a whole answer."""

    created_at: object = None
    done: object = None


decode_counts: Final = msgspec.json.Decoder(_NativeCounts).decode
decode_whole: Final = msgspec.json.Decoder(_NativeWhole).decode


class ErrorBody(msgspec.Struct):
    error: str | dict[str, object] | None = None


class LastLine(msgspec.Struct):
    done: bool = False
    error: msgspec.Raw = msgspec.Raw()


class _Message(msgspec.Struct):
    content: object = None
    thinking: object = None
    reasoning: object = None


class _Native(msgspec.Struct):
    created_at: object = None
    done: object = None
    response: object = None
    thinking: object = None
    message: _Message = msgspec.field(default_factory=_Message)
    debug: msgspec.Raw | None = msgspec.field(default=None, name="_debug_info")

    @staticmethod
    def suspect(body: bytes) -> bool:
        """Whether it has anything that only a faulty answer has; most have not, and need no decoding."""
        return b'"done":false' in body or b'"created_at":"0001-' in body

    @property
    def blank(self) -> bool:
        """Made of nothing."""
        return self.created_at == NO_TIME

    @property
    def unfinished(self) -> bool:
        """Says itself that it is not done."""
        return self.done is False and self.debug is None

    @property
    def texts(self) -> list[object]:
        """What it said, in that order."""
        return [self.thinking, self.message.thinking, self.response, self.message.content]


class _Choice(msgspec.Struct):
    finish_reason: object = msgspec.UNSET
    message: _Message = msgspec.field(default_factory=_Message)
    text: object = None


class _OpenAi(msgspec.Struct):
    created: object = None
    choices: list[_Choice] = []

    @staticmethod
    def suspect(body: bytes) -> bool:
        return b'"finish_reason":null' in body or b'"created":-' in body

    @property
    def blank(self) -> bool:
        return self.created == _ZERO_TIME

    @property
    def unfinished(self) -> bool:
        return bool(self.choices) and self.choices[0].finish_reason is None

    @property
    def texts(self) -> list[object]:
        return [text for choice in self.choices for text in (choice.message.reasoning, choice.message.content, choice.text)]


class _Part(msgspec.Struct):
    text: object = None
    thinking: object = None


class _Anthropic(msgspec.Struct):
    type: object = None
    model: object = None
    content: list[_Part] | None = None
    stop_reason: object = None

    @staticmethod
    def suspect(body: bytes) -> bool:
        return b'"stop_reason":"' not in body

    @property
    def blank(self) -> bool:
        return self.type == "message" and self.model == "" and self.content is None

    @property
    def unfinished(self) -> bool:
        return self.type == "message" and self.stop_reason is None

    @property
    def texts(self) -> list[object]:
        return [text for part in self.content or () for text in (part.thinking, part.text)]


class _Tokens(msgspec.Struct):
    input_tokens: int = -1
    output_tokens: int = -1


class _Item(msgspec.Struct):
    content: list[_Part] | None = None


class _Responses(msgspec.Struct):
    created_at: object = None
    status: object = None
    output: list[_Item] | None = None
    usage: _Tokens | None = None

    @staticmethod
    def suspect(body: bytes) -> bool:
        return b'"input_tokens":0' in body or b'"created_at":-' in body

    @property
    def blank(self) -> bool:
        return self.created_at == _ZERO_TIME

    @property
    def unfinished(self) -> bool:
        tokens = self.usage
        return self.status == "completed" and tokens is not None and tokens.input_tokens == 0 and tokens.output_tokens == 0

    @property
    def texts(self) -> list[object]:
        return [part.text for item in self.output or () for part in item.content or ()]


ANSWERS: Final[dict[Route, type[_Native] | type[_OpenAi] | type[_Responses] | type[_Anthropic]]] = {
    Route.CHAT: _Native,
    Route.GENERATE: _Native,
    Route.V1_CHAT: _OpenAi,
    Route.V1_COMPLETIONS: _OpenAi,
    Route.V1_RESPONSES: _Responses,
    Route.V1_MESSAGES: _Anthropic,
}
