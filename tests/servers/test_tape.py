"""What the tape still has after some lengths of it, and that nothing of a length that went is played."""

import pytest

from core.config import RouterConfig
from core.dump import TICK
from core.router import Router
from core.units import Instant
from servers import tape as under_test
from servers.tape import Tape

LENGTH = 5


@pytest.mark.parametrize("total", range(1, 4 * LENGTH))
def test_two_lengths_are_kept_in_order(monkeypatch: pytest.MonkeyPatch, total: int) -> None:
    monkeypatch.setattr(under_test, "STEPS_PER_LENGTH", LENGTH)
    tape = Tape(Router(RouterConfig(), now=Instant(0.0)))
    for number in range(total):
        if tape.due:
            tape.turn()
        tape.add(Instant(float(number)), TICK, [])
    begins = max(0, (total - 1) // LENGTH - 1) * LENGTH
    assert [at for at, _, _ in tape.steps()] == [float(number) for number in range(begins, total)]
    assert tape.due == (total % LENGTH == 0)


def test_a_length_may_be_longer_than_the_one_before_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(under_test, "STEPS_PER_LENGTH", LENGTH)
    tape = Tape(Router(RouterConfig(), now=Instant(0.0)))
    number = 0
    for steps in (LENGTH, LENGTH + 3, LENGTH, LENGTH + 4, LENGTH + 1):  # a tick does not turn it
        tape.turn()
        for _ in range(steps):
            tape.add(Instant(float(number)), TICK, None)
            number += 1
    kept = LENGTH + 4 + LENGTH + 1
    assert [at for at, _, _ in tape.steps()] == [float(at) for at in range(number - kept, number)]
