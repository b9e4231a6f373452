"""Digests of a dozen short worlds, under several hash seeds and interpreters: they must be one (D1).

`python -m tests.core.simulation.digests [PYTHON ...]` compares this interpreter with those named (each needs msgspec), and says so.
"""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[3]
COUNT = 12
_PROGRAM = f"""
from core.simulation.options import swarm
from core.simulation.prng import Prng
from core.simulation.world import run
print(*[run(seed, swarm(Prng(seed).split("options")), 300).digest for seed in range({COUNT})])
"""


def digests(python: str, hash_seed: str) -> list[str]:
    """Of the runs in an interpreter of their own."""
    environ = {"PATH": os.environ["PATH"], "PYTHONHASHSEED": hash_seed, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([python, "-c", _PROGRAM], env=environ, capture_output=True, text=True, check=True, timeout=120)
    return done.stdout.split()


def main(pythons: list[str]) -> int:
    """Compare; returns the exit status."""
    first = digests(sys.executable, "1")
    differs = 0
    for number, python in enumerate([sys.executable, *pythons], start=2):
        same = digests(python, str(number)) == first
        differs += not same
        print(f"{python}, hash seed {number}: {'the same' if same else 'ANOTHER DIGEST'}")
    return 1 if differs else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
