"""Recorded inference requests of every protocol against the simulated Ollama, group by group; what differs is what the page says."""

import pytest

from tests.agent.recorded_groups import BEGIN, GROUPS, PAGE, differing, node, questions, reason

WHOLE = ("generate", "chat", "embed", "embeddings", "v1", "insert", "unicode", "repeat", "end")
"""Groups in which nothing may differ."""


@pytest.mark.parametrize("group", GROUPS)
async def test_recorded_requests_are_answered_in_the_recorded_shape(group: str) -> None:
    async with node().serve() as sim:
        count, wrong = await differing(sim, group)
    unexplained = {case: why for case, why in wrong.items() if group in WHOLE or reason(case) is None}
    assert unexplained == {}
    row = next(line for line in PAGE.read_text().partition(BEGIN)[2].splitlines() if line.startswith(f"| `{group}` |"))
    assert row.startswith(f"| `{group}` | {count} | {count - len(wrong)} |"), "write the table anew: python -m tests.agent.recorded_groups"


def test_all_protocols_are_among_them() -> None:
    asked = {target.partition("?")[0] for group in GROUPS for _, target, _ in questions(group)}
    assert {"/v1/responses", "/v1/messages", "/v1/completions", "/v1/chat/completions", "/v1/embeddings", "/api/chat"} <= asked
