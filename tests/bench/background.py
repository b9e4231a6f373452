"""What an operator may do while tokens flow: export all of history, again and again, and ask for a model plan.

`python -m tests.bench.background PORT`. A process of its own that throws away what it reads; when told to
end it prints one line of JSON, what was read.
"""

import http.client
import json
import signal
import sys
import threading
import time
from collections.abc import Callable

EXPORT = "/api/dashboard/request-responses/export?format=csv"
PLAN = "/api/placement"
PLAN_EVERY_S = 1.0
READ_BYTES = 1 << 18


def main() -> None:
    port = int(sys.argv[1])
    ended = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: ended.set())
    counts = {"exports": 0, "rows": 0, "plans": 0, "failures": 0}

    def again_and_again(job: Callable[[http.client.HTTPConnection], None], pause_s: float) -> None:
        while not ended.is_set():
            line = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
            try:
                job(line)
            except (OSError, http.client.HTTPException, ValueError):
                counts["failures"] += 1
            finally:
                line.close()
            ended.wait(pause_s)

    def export(line: http.client.HTTPConnection) -> None:
        line.request("GET", EXPORT)
        answer = line.getresponse()
        if answer.status != 200:
            raise ValueError
        while data := answer.read(READ_BYTES):
            counts["rows"] += data.count(b"\n")
            if ended.is_set():
                return
        counts["exports"] += 1

    def plan(line: http.client.HTTPConnection) -> None:
        line.request("GET", PLAN)
        answer = line.getresponse()
        if answer.status != 200 or "rates_per_s" not in json.loads(answer.read()):
            raise ValueError
        counts["plans"] += 1

    threads = [
        threading.Thread(target=again_and_again, args=(export, 0.0), daemon=True),
        threading.Thread(target=again_and_again, args=(plan, PLAN_EVERY_S), daemon=True),
    ]
    began = time.monotonic()
    for thread in threads:
        thread.start()
    ended.wait()
    print(json.dumps({**counts, "seconds": time.monotonic() - began}), flush=True)


if __name__ == "__main__":
    main()
