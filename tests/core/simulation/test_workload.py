"""Rows of traces become requests, the same ones for the same seed."""

import itertools

import pytest

from core.simulation.prng import Prng
from core.simulation.workload import CODE_MIX, CONVERSATION_MIX, INPUT_MAX, arrivals, azure_rows, mooncake_rows

AZURE = ["TIMESTAMP,ContextTokens,GeneratedTokens", "2023-11-16 18:15:46.6805900,374,44", "", "2023-11-16 18:17:03.9799600,4808,10"]
MOONCAKE = [
    '{"timestamp": 0, "input_length": 6758, "output_length": 500, "hash_ids": [0, 1, 2]}',
    "",
    '{"timestamp": 3000, "input_length": 4, "output_length": 2, "hash_ids": [0]}',
]
MIXES = {"code": CODE_MIX, "conversation": CONVERSATION_MIX}


def test_azure_rows() -> None:
    rows = list(azure_rows(AZURE, kind="code"))
    assert [(row.input_tokens, row.output_tokens, row.kind) for row in rows] == [(374, 44, "code"), (4808, 10, "code")]
    assert rows[1].at_s - rows[0].at_s == pytest.approx(77.29937)


def test_a_line_that_is_none_is_refused() -> None:
    with pytest.raises(ValueError):
        list(azure_rows(["what,is,this"], kind="code"))


def test_mooncake_rows_are_scaled() -> None:
    rows = list(mooncake_rows(MOONCAKE))
    assert [(row.input_tokens, row.output_tokens, row.blocks) for row in rows] == [(844, 62, (0, 1, 2)), (1, 1, (0,))]


def test_the_rate_is_met_and_the_rhythm_kept() -> None:
    rows = [row for n in range(50) for row in azure_rows([f"2023-11-16 18:{n:02d}:00.0,100,10"], kind="code")]
    found = arrivals(rows, rate_per_s=2.0, mixes=MIXES, prng=Prng(1))
    gaps = {round(b.at_s - a.at_s, 6) for a, b in itertools.pairwise(found)}
    assert gaps == {round(25 / 49, 6)}
    assert {arrival.model for arrival in found} <= set(CODE_MIX)


def test_poisson_timing_keeps_the_lengths_and_the_mean() -> None:
    rows = [row for n in range(60) for row in azure_rows([f"2023-11-16 18:{n:02d}:00.0,{n + 1},10"] * 20, kind="conversation")]
    found = arrivals(rows, rate_per_s=4.0, mixes=MIXES, prng=Prng(1), poisson=True)
    assert found[-1].at_s == pytest.approx(1200 / 4.0, rel=0.1)
    assert [arrival.input_tokens for arrival in found] == [row.input_tokens for row in rows]


def test_the_same_seed_gives_the_same_requests_and_another_does_not() -> None:
    rows = list(azure_rows(AZURE * 20, kind="conversation"))
    one, two = (arrivals(rows, rate_per_s=1.0, mixes=MIXES, prng=Prng(5), jitter_s=3.0) for _ in range(2))
    assert one == two
    assert one != arrivals(rows, rate_per_s=1.0, mixes=MIXES, prng=Prng(6), jitter_s=3.0)
    assert max(arrival.input_tokens for arrival in one) == INPUT_MAX


def test_conversations_go_by_the_second_block() -> None:
    found = arrivals(mooncake_rows(MOONCAKE), rate_per_s=1.0, mixes=MIXES, prng=Prng(2))
    assert found[0].conversation.endswith("/1")
    assert (found[1].conversation, found[1].shared_tokens) == ("", None)


def test_a_conversation_stays_with_its_model_and_knows_what_its_last_prompt_shares() -> None:
    lines = [f'{{"timestamp": {at}, "input_length": 4096, "output_length": 8, "hash_ids": [0, 1, {2 + at // 4}, 9]}}' for at in range(8)]
    found = arrivals(mooncake_rows(lines), rate_per_s=1.0, mixes=MIXES, prng=Prng(2))
    assert len({arrival.model for arrival in found}) == 1
    assert [arrival.shared_tokens for arrival in found] == [0, 256, 256, 256, 128, 256, 256, 256]


def test_no_rows_no_requests() -> None:
    assert arrivals([], rate_per_s=1.0, mixes=MIXES, prng=Prng(1)) == []
