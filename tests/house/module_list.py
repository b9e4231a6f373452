"""`python -m tests.house.module_list`: write the list of modules in docs/architecture.md anew, from the first line of each docstring."""

import ast
import re

from tests.house.tree import ROOMS, ROOT, dotted, modules

PAGE = ROOT / "docs" / "architecture.md"
BEGIN = "<!-- the list of modules: `python -m tests.house.module_list` writes it anew -->\n"
END = "<!-- end of the list -->\n"


def described() -> dict[str, str]:
    """What each module says it is, in one line."""
    found = {}
    for room in ROOMS:
        for path in modules(room):
            text = ast.get_docstring(ast.parse((ROOT / path).read_text(encoding="utf-8"))) or ""
            found[dotted(path)] = text.split("\n")[0].rstrip(".:").replace("|", "\\|")
    return found


def listed() -> str:
    """A table for each room."""
    tables = []
    for room in ROOMS:
        rows = [f"| `{name}` | {text} |" for name, text in described().items() if name.split(".")[0] == room]
        tables.append("\n".join([f"### {room}\n", "| module | |", "| --- | --- |", *rows, "\n"]))
    return "".join(tables)


def main() -> None:
    page = PAGE.read_text(encoding="utf-8")
    pattern = re.compile(re.escape(BEGIN) + ".*?" + re.escape(END), re.DOTALL)
    assert pattern.search(page), f"{PAGE.name} has lost the marks of the list"
    PAGE.write_text(pattern.sub(lambda _: f"{BEGIN}\n{listed()}{END}", page), encoding="utf-8")


if __name__ == "__main__":
    main()
