"""Every recorded inference request, asked of the simulated Ollama: how many are answered in the recorded shape, and why not the others.

python -m tests.agent.recorded_groups      writes the table of docs/simulated.md anew
"""

import re
from pathlib import Path

import trio

from agent.simulated import SimulatedOllama, recorded_models
from tests.agent.conversations import difference
from tests.fleet.rawhttp import Answer, parse_answer, raw_request
from tests.fleet.recorded import Exchange, load

PAGE = Path(__file__).parents[2] / "docs" / "simulated.md"
BEGIN, END = "<!-- recorded: begin -->\n", "<!-- recorded: end -->\n"
GROUPS = (
    "generate", "chat", "embed", "embeddings", "v1", "tools", "think", "format", "insert", "logprobs", "unicode", "big", "cap", "parser",
    "repeat", "overflow", "end", "usage",
)  # fmt: skip
ROUTES = re.compile(r"/(api/(generate|chat|embed|embeddings)|v1/(chat/completions|completions|embeddings|responses|messages))$")
SCRIPTED_THINKING = "a template's own thinking tags, which only its parser sees"
TWICE = "Ollama asks the model twice, first to think and then for JSON; here it is asked once"
REASONS = {
    r"think/generate-(musing|native)-.*": SCRIPTED_THINKING,
    r"think/generate-.*-rawtags-.*": SCRIPTED_THINKING,
    r"format/.*-(thinker|musing)-.*": TWICE,
    r"format/chat-native-bad-empty-stream": TWICE,
    r"cap/images-real-runner-.*": "a real runner's refusals of pictures that this model's file has no part for",
    r"big/.*": "an answer of a megabyte, or one that is too large for Ollama's own reader",
    r"parser/.*": "what a broken tool call does to a parser",
    r"overflow/.*": "the number of tokens stands in the error's text, and another tokenizer counts others",
    r"usage/.*-crash-.*": "the runner dies, which is a fault here",
    r"logprobs/.*": "a parser that holds back the first token",
    r"tools/.*": "a parser that knows the functions and takes the call of another for text",
}
"""Why an answer differs, by the name of its recording."""
ELSEWHERE = {
    "names, copy, delete, blobs, tags, create": "`tests/agent/test_simulated_conversations.py`, each with its exceptions",
    "pull, push": "`tests/agent/test_simulated_transfer.py`, line by line in virtual time",
    "plain": "`tests/agent/test_simulated_recorded.py`",
    "fail, load, runner, faults, term, leak, disk, startup": "a runner, a disk or a server is broken by hand: here these are faults",
    "http": "`tests/agent/test_simulated_http.py`, with its exceptions",
    "plainB": "what models of other files show: not compared",
    "sched, cancel": "times: `core/simulation/node.py` and its tests",
}


def questions(group: str) -> dict[tuple[str, str, bytes], list[Exchange]]:
    """Each recorded request of a group, with all the answers it got."""
    found: dict[tuple[str, str, bytes], list[Exchange]] = {}
    for tape in load(group):
        if ROUTES.search(tape.target.partition("?")[0]) and tape.end not in ("reset", "left") and tape.answer.status not in (499, 503):
            found.setdefault(tape.key, []).append(tape)
    return found


async def differing(sim: SimulatedOllama, group: str) -> tuple[int, dict[str, str]]:
    """How many requests there are, and what differs by recording."""
    wrong: dict[str, str] = {}
    asked = questions(group)
    for takes in asked.values():
        request = takes[0].request.replace(b"\r\n", b"\r\nConnection: close\r\n", 1)
        data = await raw_request(sim.port, request)
        got: Answer | None = parse_answer(data, takes[0].method) if b"\r\n\r\n" in data else None
        found = [difference(got, take.answer) for take in takes]
        if "" not in found:
            wrong[takes[0].case.partition("#")[0]] = found[0]
    return len(asked), wrong


def node() -> SimulatedOllama:
    """A node with the recorded models."""
    return SimulatedOllama(models=recorded_models(), speed=200, load_s=0.0)


def reason(case: str) -> str | None:
    """Why the answer to a recording differs, if it may."""
    return next((text for pattern, text in REASONS.items() if re.fullmatch(pattern, case)), None)


async def table() -> str:
    """The table of the page."""
    rows = ["| recordings | requests | in the recorded shape | the others |", "| --- | ---: | ---: | --- |"]
    async with node().serve() as sim:
        for group in GROUPS:
            count, wrong = await differing(sim, group)
            why: dict[str, int] = {}
            for case in wrong:
                text = reason(case) or "not explained"
                why[text] = why.get(text, 0) + 1
            others = "; ".join(f"{number}: {text}" for text, number in why.items())
            rows.append(f"| `{group}` | {count} | {count - len(wrong)} | {others} |")
    rows += [f"| {', '.join(f'`{name}`' for name in names.split(', '))} | | | {text} |" for names, text in ELSEWHERE.items()]
    return "\n".join(rows) + "\n"


def main() -> None:
    """Write the table into the page."""
    page = PAGE.read_text()
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    PAGE.write_text(before + BEGIN + trio.run(table) + END + after)


if __name__ == "__main__":
    main()
