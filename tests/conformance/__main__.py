"""`python -m tests.conformance`: run everything, say what fails; with `--write`, write docs/compatibility.md from it."""

import sys

from tests.conformance.page import PAGE, written
from tests.conformance.replays import REPLAYS
from tests.conformance.run import all_outcomes, checked, replayed


def main() -> int:
    page = written()
    problems = [f"{case}: {outcome.problem}" for case, outcome in all_outcomes().items() if outcome.problem]
    problems += [f"{replay}: {problem}" for replay in REPLAYS if (problem := replayed(replay.program)[replay].problem)]
    problems += [f"{text}: {problem}" for text, problem in checked().items() if problem]
    print(*problems, sep="\n", file=sys.stderr)
    if "--write" in sys.argv[1:]:
        PAGE.write_text(page, encoding="utf-8")
    tried = len(all_outcomes()) + len(REPLAYS) + len(checked())
    print(f"{tried - len(problems)} of {tried} as they must be")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
