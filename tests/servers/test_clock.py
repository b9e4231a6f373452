"""Ids and times as shells make them."""

import re
import uuid

from core.units import UnixMs
from servers import clock


def test_ids_are_uuid_v4_and_new_each_time() -> None:
    ids = {clock.new_request_id() for _ in range(2000)} | {clock.new_agent_id()}
    assert len(ids) == 2001
    assert {each[19] for each in ids} == set("89ab")
    assert all(str(uuid.UUID(each)) == each and uuid.UUID(each).version == 4 for each in ids)


def test_ids_begin_with_the_time_so_that_an_index_of_them_grows_at_its_end() -> None:
    first = clock.unix_ms()
    ids = [clock.new_request_id() for _ in range(200)]
    told = [uuid.UUID(each).int >> 80 for each in ids]
    assert told == sorted(told)
    assert first <= told[-1] <= clock.unix_ms()
    assert len({each[14:] for each in ids}) == 200


def test_a_stable_id_is_a_uuid_v4_that_depends_on_the_address_alone() -> None:
    first = clock.stable_agent_id("10.0.0.5:11434")
    assert first == clock.stable_agent_id("10.0.0.5:11434") != clock.stable_agent_id("10.0.0.6:11434")
    assert uuid.UUID(first).version == 4


def test_codes_can_be_read_aloud() -> None:
    assert all(re.fullmatch(r"[A-HJ-NP-Z]{4}-\d{4}", clock.new_code()) for _ in range(200))


def test_times_are_rfc_3339_in_utc() -> None:
    assert clock.rfc3339(UnixMs(0)) == "1970-01-01T00:00:00Z"
    assert clock.rfc3339(UnixMs(1_761_825_600_042)) == "2025-10-30T12:00:00.042Z"


async def test_now_is_trios_clock(autojump_clock: object) -> None:
    import trio

    before = clock.now()
    await trio.sleep(1000)
    assert clock.now() - before == 1000
