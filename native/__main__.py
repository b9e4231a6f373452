"""`python -m native`: compiles the hot modules, once for each state of the source; about a minute.

Decides how they are compiled. Invariants: what lies at `native.place()` is whole, for it is moved there when it is done; what was compiled
of other source is removed. Exit status 0: there, 1: it could not be compiled, and one line says why.
"""

import contextlib
import io
import os
import shutil
import sys
import tempfile
from pathlib import Path

from rich.console import Console

from native import MODULES, ROOT, place


def main() -> int:
    """Compile, unless that was done already."""
    console, compiled = Console(stderr=True), place()
    if compiled.is_dir():
        console.print(f"{len(MODULES)} modules are compiled already: {compiled.relative_to(ROOT)}")
        return 0
    try:
        from mypyc.build import mypycify
        from setuptools import Distribution
        from setuptools.command.build_ext import build_ext
    except ImportError as error:
        console.print(f"Nothing was compiled: {error.name} is missing (pip install 'ollama-router\\[native]').")
        return 1
    compiled.parent.mkdir(exist_ok=True)
    os.chdir(ROOT)
    said = io.StringIO()
    with (
        tempfile.TemporaryDirectory(dir=compiled.parent) as directory,
        console.status(f"Compiling {len(MODULES)} modules, a minute's work"),
    ):
        try:
            with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
                paths = [f"{name.replace('.', '/')}.py" for name in MODULES]
                parts = mypycify(paths, opt_level="2", debug_level="0", group_name="ollama_router", target_dir=f"{directory}/c")
                for part in parts:
                    part.extra_compile_args += ["-Wno-all", "-w"]  # to look for what to warn of takes GCC longer than to compile
                command = build_ext(Distribution({"name": "ollama-router-native", "ext_modules": parts}))
                command.build_lib, command.build_temp = f"{directory}/lib", f"{directory}/temp"
                command.ensure_finalized()
                command.run()
        except (Exception, SystemExit) as error:
            _explain(console, error, said.getvalue(), compiled.parent / "failed.txt")
            return 1
        Path(directory, "lib").rename(compiled)
    for other in compiled.parent.iterdir():
        if other != compiled:
            shutil.rmtree(other) if other.is_dir() else other.unlink()
    console.print(f"Compiled {len(MODULES)} modules: {compiled.relative_to(ROOT)}")
    return 0


def _explain(console: Console, error: BaseException, said: str, log: Path) -> None:
    """One line; the rest is in a file."""
    log.write_text(f"{said}\n{type(error).__name__}: {error}\n")
    why = str(error)
    if shutil.which("cc") is None or "Python.h" in said:
        why = "there is no C compiler, or the headers of Python are missing (on Debian: apt-get install gcc python3-dev)"
    console.print(f"Nothing was compiled: {why}. All that was said: {log.relative_to(ROOT)}. The router runs without.", markup=False)


if __name__ == "__main__":
    sys.exit(main())
