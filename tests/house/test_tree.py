"""House rules about the text of the project, as tests: sizes, leftovers, maps that must be complete."""

import ast
import re
from pathlib import Path

import pytest

from agent import config as agent_settings
from servers import settings as coordinator_settings
from tests.house.coverage_by_module import owned
from tests.house.tree import ROOMS, ROOT, dotted, files, mirror_of, modules, own_tests

FUNCTION_LINES_MAX = 70
FILE_LINES_MAX = 600
LEFTOVER = re.compile(r"\b(TO" + r"DO|FIX" + r"ME|X" + r"XX)\b")
MACHINE_PATH = re.compile(r"(?<![\w.~$}-])/(work|tmp|root|home|Users)/\w")
RECORDED = (".jsonl", ".gz", ".png", ".ico", ".lock")
ALL_MODULES = [path for room in ROOMS for path in modules(room)]


def functions(path: Path) -> list[ast.FunctionDef | ast.AsyncFunctionDef]:
    tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
    return [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]


@pytest.mark.parametrize("path", files(".py"), ids=str)
def test_files_and_functions_are_small(path: Path) -> None:
    lines = len((ROOT / path).read_text(encoding="utf-8").splitlines())
    assert lines <= FILE_LINES_MAX, f"{path} has {lines} lines"
    for function in functions(path):
        length = (function.end_lineno or function.lineno) - function.lineno + 1
        assert length <= FUNCTION_LINES_MAX, f"{path}:{function.lineno} {function.name} has {length} lines"


@pytest.mark.parametrize("path", ALL_MODULES, ids=str)
def test_modules_say_what_they_are_for(path: Path) -> None:
    assert ast.get_docstring(ast.parse((ROOT / path).read_text(encoding="utf-8"))), f"{path} has no docstring"


@pytest.mark.parametrize("path", [path for path in files() if not path.name.endswith(RECORDED)], ids=str)
def test_nothing_is_left_over_and_nothing_names_a_machine(path: Path) -> None:
    text = (ROOT / path).read_text(encoding="utf-8")
    for pattern, what in ((LEFTOVER, "an unfinished place"), (MACHINE_PATH, "a path of one machine")):
        found = pattern.search(text)
        assert found is None, f"{path}:{text.count(chr(10), 0, found.start()) + 1} has {what}: {found[0]}"


def test_the_architecture_page_lists_every_module() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`((?:core|edge|servers|agent|native)(?:\.\w+)+)`", page))
    existing = {dotted(path) for path in ALL_MODULES}
    assert existing - named == set(), "modules that docs/architecture.md does not list"
    packages = {dotted(path.parent) for room in ROOMS for path in files("__init__.py", under=room)}
    assert named - existing - packages == set(), "docs/architecture.md lists what does not exist"


def test_the_operators_page_lists_every_setting_and_none_that_does_not_exist() -> None:
    page = (ROOT / "docs" / "operators.md").read_text(encoding="utf-8")
    coordinator, _, agent = page.partition("## The agent's settings")
    for text, settings in ((coordinator, {setting.name for setting in coordinator_settings.TABLE}), (agent, set(agent_settings.TABLE))):
        assert settings - set(re.findall(r"`([A-Z_]+)`", text)) == set(), "settings that docs/operators.md does not list"
        rows = re.findall(r"^\| `([A-Z_]+)`", text, re.MULTILINE)
        assert sorted(rows) == sorted(settings & set(rows)), "rows of docs/operators.md that are no settings, or double"


def test_the_operators_page_lists_every_route() -> None:
    page = (ROOT / "docs" / "operators.md").read_text(encoding="utf-8")
    found = [re.findall(r"@app\.\w+\(\"([^\"]+)", (ROOT / path).read_text(encoding="utf-8")) for path in modules("servers")]
    routes = {re.sub(r"<(?:\w+:)?(\w+)>", r":\1", route) for routes in found for route in routes}
    assert routes, "the routes are declared in another way now"
    assert {route for route in routes if f"`{route}`" not in page} == set(), "routes that docs/operators.md does not list"


@pytest.mark.parametrize("path", modules("core"), ids=str)
def test_each_module_of_the_core_has_its_test_file(path: Path) -> None:
    assert (ROOT / mirror_of(path)).is_file(), f"{path} needs {mirror_of(path)}"


def test_a_part_of_the_tests_belongs_to_the_module_with_the_longest_name_that_fits() -> None:
    owners: dict[Path, Path] = {}
    for module in modules("core"):
        for tests in own_tests(module):
            assert owners.setdefault(tests, module) == module, f"{tests} counts for two modules"
    for tests, module in (
        ("test_placement.py", "placement.py"),
        ("test_placement_search.py", "placement_search.py"),
        ("test_registry_reports.py", "registry.py"),
    ):
        assert owners.get(Path("tests", "core", tests)) == Path("core", module)


@pytest.mark.parametrize("page", files(".md"), ids=str)
def test_links_between_pages_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", (ROOT / page).read_text(encoding="utf-8")):
        assert (ROOT / page.parent / target).exists(), f"{page} links to {target}"


def test_what_is_left_to_the_measuring_of_coverage_is_run_there() -> None:
    measured = {path for module in modules("core") for path in own_tests(module)}
    assert {Path(path) for path in owned()} == measured
