"""How the coordinator's other processes yield to what serves.

Decides by how much; knows nothing of what they do. Invariant: they still get their share when the machine is busy, only later.
"""

import os
from typing import Final

YIELDS: Final = 10
"""Steps of niceness."""


def yield_to_serving() -> None:
    """From here on this process runs when those that serve do not want the processor, and a tenth of the time when they do."""
    os.nice(YIELDS)
