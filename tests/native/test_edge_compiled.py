"""What was compiled of the edge does over real sockets what its source does, and is written so that mypyc gets it right."""

import ast
import os
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest

import native

ROOT = Path(__file__).parents[2]
FILES = (
    "desk", "headers", "listener", "pool", "proxy", "quick", "selection", "tally", "told", "verdicts", "wire", "wire_client", "wire_heads",
)  # fmt: skip
"""Of `tests/edge`. Not those whose nodes and clients are made of Python: a compiled function takes none but the real classes."""
PURE = {"len", "min", "max", "find", "rfind", "start", "end"}


def test_the_edges_own_tests_pass() -> None:
    for words in (["native"], ["pytest", "-p", "tests.native.compiled", *(f"tests/edge/test_{name}.py" for name in FILES)]):
        command = [sys.executable, "-m", *words]
        done = subprocess.run(command, cwd=ROOT, env=dict(os.environ), stdin=subprocess.DEVNULL, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("name", native.MODULES)
def test_what_mypyc_gets_wrong_is_not_in_it(name: str) -> None:
    """It makes the calls in a slice's bounds twice, and has a name that two `except` clauses give hold the first one's class only."""
    tree = ast.parse((ROOT / name.replace(".", "/")).with_suffix(".py").read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.Slice):
            calls = [call.func for call in ast.walk(node) if isinstance(call, ast.Call)]
            called = {func.attr if isinstance(func, ast.Attribute) else ast.unparse(func) for func in calls}
            assert called <= PURE, f"line {node.lineno}: what {called} return goes into a variable first"
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            caught: defaultdict[str, set[str]] = defaultdict(set)
            for clause in ast.walk(node):
                if isinstance(clause, ast.ExceptHandler) and clause.name is not None and clause.type is not None:
                    caught[clause.name].add(ast.unparse(clause.type))
            for error, types in caught.items():
                assert len(types) == 1, f"{node.name}: {error!r} is one of {types}; they need names of their own"
