"""A history of many records, made by the store's own statements before a coordinator starts.

Decides what such records look like: short chats over the last days. Knows nothing of who reads them.
"""

import random
import time
import uuid
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from core.history import BODY_WHOLE, HistoryRecord, number_of
from core.units import UnixMs
from servers.clock import unix_ms
from servers.store.engine import database_url, open_engine
from servers.store.statements import Statements

SPAN_MS = 5 * 86_400_000
BATCH = 20_000
_REQUEST = b'{"model":"llama3.2:3b","messages":[{"role":"user","content":"question %d: why is the sky blue?"}],"stream":false}'
_ANSWER = b'{"model":"llama3.2:3b","message":{"role":"assistant","content":"answer %d: Rayleigh scattering."},"done":true,"eval_count":7}'


def _made(count: int) -> Iterator[HistoryRecord]:
    dice = random.Random(1)
    end_ms = unix_ms()
    for one in range(count):
        at = UnixMs(end_ms - SPAN_MS + one * SPAN_MS // count)
        request, answer, node = _REQUEST % one, _ANSWER % one, dice.randrange(10)
        yield HistoryRecord(
            number=number_of(at, 0), request_id=str(uuid.UUID(int=dice.getrandbits(128), version=4)), at_ms=at,
            completed_at_ms=UnixMs(at + 900), request_type="chat", path="/api/chat", model=f"llama3.2:{dice.randrange(40)}b",
            agent_id=f"agent-{node}", agent_name=f"node{node}", client="127.0.0.1", key_id=None, status="success", message="",
            http_status=200, duration_ms=900.0, queue_ms=0.0, ttft_ms=80.0, predicted_start_ms=None, prompt_tokens=26, output_tokens=7,
            load_ms=0.0, attempts=b'[{"node":"node1","outcome":"success","ms":900.0}]', edge="embedded", chunks=1, body_bytes=len(answer),
            request_body=request, response_body=answer, bodies=BODY_WHOLE,
        )  # fmt: skip


def fill(data_dir: Path, count: int) -> float:
    """Put `count` records into the database of a coordinator with this data directory that does not run; how many seconds it took."""
    began = time.monotonic()
    data_dir.mkdir(parents=True, exist_ok=True)
    engine = open_engine(database_url("sqlite://coordinator.db", data_dir))
    try:
        statements = Statements("sqlite", "bench")
        records = _made(count)
        while batch := list(islice(records, BATCH)):
            with engine.begin() as connection:
                statements.insert(connection, batch)
    finally:
        engine.dispose()
    return time.monotonic() - began
