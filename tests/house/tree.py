"""The project's own files, for the tests that read them. Knows where things lie, judges nothing."""

from pathlib import Path

ROOT = Path(__file__).parents[2]
ROOMS = ("core", "edge", "servers", "agent", "native")
NOT_OURS = {
    ".coverage",
    ".git",
    ".venv",
    ".hypothesis",
    ".mypy_cache",
    ".ruff_cache",
    ".import_linter_cache",
    "__pycache__",
    "build",
    "dist",
    "node_modules",
}
COVERAGE_PERCENT_MIN = 95


def files(*suffixes: str, under: str = ".") -> list[Path]:
    """The tree's files, relative to its root, that end in one of `suffixes` (all of them when there is none)."""
    found = []
    for path in sorted((ROOT / under).rglob("*")):
        inside = path.relative_to(ROOT)
        if path.is_file() and not NOT_OURS.intersection(inside.parts) and (not suffixes or path.name.endswith(suffixes)):
            found.append(inside)
    return found


def modules(room: str) -> list[Path]:
    """The modules of a room, without the `__init__` that only say what a package is."""
    return [path for path in files(".py", under=room) if path.name != "__init__.py"]


def dotted(path: Path) -> str:
    """`core/names.py` as `core.names`."""
    return ".".join(path.with_suffix("").parts)


def mirror_of(module: Path) -> Path:
    """Where the tests of a module of the core lie: `core/simulation/node.py` has `tests/core/simulation/test_node.py`."""
    return Path("tests", *module.parent.parts, f"test_{module.name}")


def own_tests(module: Path) -> list[Path]:
    """The module's own tests: its mirror, and beside it `test_<module>_<part>.py`. A file fits the longest name only."""
    mirror = mirror_of(module)
    parts = [path.relative_to(ROOT) for path in sorted((ROOT / mirror.parent).glob(f"{mirror.stem}_*.py"))]
    longer = [f"test_{path.stem}" for path in (ROOT / module.parent).glob(f"{module.stem}_*.py")]
    return [mirror, *(path for path in parts if not any(f"{path.stem}_".startswith(f"{name}_") for name in longer))]
