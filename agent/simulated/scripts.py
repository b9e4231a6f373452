"""What a scripted model says: the answers that the recorded runner gave on demand, for prompts with `SCRIPT:name` in them.

Decides tokens, like `answers`, and never when they come. Only models that are marked so follow scripts; the last one named counts. What a
script does that is no answer (a crash, a cut) is a fault, and not here.
"""

import re
from typing import Any, Final

from agent.simulated.answers import Piece, Question, call_id, dice_for

MARK: Final = re.compile(r"SCRIPT:([a-z0-9]+)(?::(\d+))?")
GUARD: Final = 32
"""So many equal tokens in a row end an answer, and the last of them is not sent; one less if they are blank. Not on the native path."""
TOOL_TOKENS: Final = 6
"""Tokens of a call before its last, of which nothing is seen."""
UNFINISHED: Final = ""
"""The reason of an answer that ends without one."""
WEATHER: Final = ("get_weather", {"city": "Paris"})
TIME: Final = ("get_time", {"zone": "CET", "offset": 2})
UNICODE: Final = (
    "Hi ",
    "😀",
    " 你好，",
    "世界",
    " é",
    " 👨‍👩‍👧",
    " <b>",
    "a & b",
    "</b>",
    ' "q"',
    " \\n",
    "\n\t",
    ".",
    "\u2028",
    "\x00",
    "x",
)


class Script:
    """Thinking, text and calls, in this order, and how it ends."""

    def __init__(
        self, *content: str, thinking: tuple[str, ...] = (), calls: tuple[tuple[str, dict[str, Any]], ...] = (), reason: str = "stop"
    ) -> None:
        self.content = content
        self.thinking = thinking
        self.calls = calls
        self.reason = reason


COUNTED: Final = ("First", " I", " count", " to", " two.")
FOUR: Final = ("The", " answer", " is", " four.")
NEEDED: Final = ("I", " need", " the", " weather.")
SCRIPTS: Final[dict[str, Script]] = {
    "one": Script("Hi"),
    "plain": Script("The", " weather", " is", " fine", " and", " it", " stays", " so."),
    "answer": Script("It", " is", " 18", " degrees", " in", " Paris."),
    "think": Script(*FOUR, thinking=COUNTED),
    "thinkonly": Script(thinking=("Still", " musing", " about"), reason="length"),
    "tool": Script(calls=(WEATHER,)),
    "tool2": Script(calls=(WEATHER, TIME)),
    "texttool": Script("Let", " me", " look.", calls=(WEATHER,)),
    "thinktool": Script(thinking=NEEDED, calls=(WEATHER,)),
    "schema": Script("{", '"n"', ":", " 4", "}"),
    "uni": Script(*UNICODE),
    "empty": Script(),
    "limit": Script("cut", " at", " the", reason="length"),
    "count": Script(*(f" {number}" for number in range(1, 41))),
    "rep": Script(*[" no"] * 40),
    "repnl": Script(*["\n"] * 40),
    "opentool": Script("Wait."),
    "unknowntool": Script(calls=(("no_such_tool", {"x": "1"}),)),
}


def scripted(question: Question) -> tuple[list[Piece], str] | None:
    """The tokens and the end of the scripted answer, if the model follows scripts and the prompt names one."""
    named = MARK.findall(question.prompt) if question.model.scripted else []
    script = SCRIPTS.get(named[-1][0]) if named else None
    if script is None:
        return None
    native = question.model.native
    content = script.content[: int(named[-1][1])] if named[-1][1] else script.content
    pieces = [Piece(thinking=text) for text in script.thinking] if question.think else []
    if (
        question.think and not native and not script.thinking and question.schema is None
    ):  # it begins to think, and never says that it is done
        pieces, content = [Piece(thinking=text) for text in content], ()
    pieces += [Piece(content=text) for text in content]
    pieces += _calls(script, question)
    if not native and (guarded := guard(pieces)) is not None:
        return pieces[:guarded], UNFINISHED
    if question.limit is not None and len(pieces) > question.limit:
        return pieces[: question.limit], "length"
    return pieces, script.reason


def _calls(script: Script, question: Question) -> list[Piece]:
    """A piece for each call; on the native path, where they come together and text before them ends with a blank, one for all."""
    dice = dice_for(question.prompt, "calls")
    native = question.model.native
    calls = [
        {
            "id": f"r{at}ABCDEFGHIJKLMNOPQRSTUVWXYZ012" if native else call_id(dice),
            "function": {"index": at, "name": name, "arguments": arguments},
        }
        for at, (name, arguments) in enumerate(script.calls)
    ]
    if native and calls:
        return [*([Piece(content=" ")] if script.content else []), Piece(calls=tuple(calls))]
    return [piece for call in calls for piece in (*[Piece()] * TOOL_TOKENS, Piece(calls=(call,)))]


def guard(pieces: list[Piece]) -> int | None:
    """How many of `pieces` are sent before too many equal ones in a row end the answer; None if none do."""
    row = 0
    for at, piece in enumerate(pieces):
        row = row + 1 if at and piece.content and piece.content.strip() == pieces[at - 1].content.strip() else 1
        if row == GUARD - (not piece.content.strip()):
            return at
    return None
