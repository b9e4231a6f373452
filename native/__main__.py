"""`python -m native`: compiles the hot modules, once for each state of the source; a minute or two.

Decides how they are compiled. Invariants: what lies at `native.place()` is whole, for it is moved there when it is done; what was compiled
of other source is removed. Exit status 0: there, 1: it could not be compiled, and one line says why.
"""

import contextlib
import io
import os
import shutil
import sys
import sysconfig
import tempfile
from pathlib import Path
from typing import Final

from rich.console import Console

from native import MODULES, ROOT, path_of, place

CHECKER: Final = ("--ignore-missing-imports", "--explicit-package-bases", f"--cache-dir={os.devnull}")
"""How mypy looks at the source first: `make check` is stricter, and an installation has no settings for it."""
IMPORTED: Final = ("core", "edge", "servers", "native")
"""Packages that the modules import of ours."""


def main() -> int:
    """Compile, unless that was done already."""
    console, compiled = Console(stderr=True, soft_wrap=True), place()
    if compiled.is_dir():
        console.print(f"{len(MODULES)} modules are compiled already: {os.path.relpath(compiled)}")
        return 0
    why = _missing()
    if why is None:
        compiled.parent.mkdir(exist_ok=True)
        with console.status(f"Compiling {len(MODULES)} modules, a minute's work or two"):
            why = _compile(compiled)
    if why is not None:
        console.print(f"Nothing was compiled: {why}. The router runs without.", markup=False)
        return 1
    for other in compiled.parent.iterdir():
        if other != compiled:
            shutil.rmtree(other) if other.is_dir() else other.unlink()
    console.print(f"Compiled {len(MODULES)} modules: {os.path.relpath(compiled)}")
    return 0


def _missing() -> str | None:
    """What has to be installed first."""
    try:
        import mypyc  # noqa: F401
        import setuptools  # noqa: F401
    except ImportError as error:
        return f"{error.name} is missing (pip install 'ollama-router[native]')"
    compiler = (os.environ.get("CC") or sysconfig.get_config_var("CC") or "cc").split()[0]
    if shutil.which(compiler) is None:
        return f"there is no C compiler {compiler} (on Debian: apt-get install gcc)"
    if not Path(sysconfig.get_path("include"), "Python.h").is_file():
        return "the headers of Python are missing (on Debian: apt-get install python3-dev)"
    return None


def _compile(compiled: Path) -> str | None:
    """Put there what was compiled; returns why that failed."""
    from mypyc.build import mypycify
    from setuptools import Distribution
    from setuptools.command.build_ext import build_ext

    said = io.StringIO()
    with tempfile.TemporaryDirectory(dir=compiled.parent) as directory:
        # Apart from whatever else lies beside the source: an installation's other packages would be taken for ours.
        source = Path(directory, "source")
        for package in IMPORTED:
            shutil.copytree(ROOT / package, source / package, ignore=shutil.ignore_patterns("__pycache__", "build"))
        try:
            with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said), contextlib.chdir(source):
                paths = [path_of(name).with_suffix(".py").as_posix() for name in MODULES]
                parts = mypycify(
                    [*CHECKER, *paths], opt_level="2", debug_level="0", group_name="ollama_router", target_dir=f"{directory}/c"
                )
                for part in parts:
                    part.extra_compile_args += ["-Wno-all", "-w"]  # to look for what to warn of takes GCC longer than to compile
                command = build_ext(Distribution({"name": "ollama-router-native", "ext_modules": parts}))
                command.build_lib, command.build_temp = f"{directory}/lib", f"{directory}/temp"
                command.ensure_finalized()
                command.run()
        except (Exception, SystemExit) as error:
            log = compiled.parent / "failed.txt"
            log.write_text(f"{said.getvalue()}\n{type(error).__name__}: {error}\n")
            return f"mypyc or the C compiler failed, as {os.path.relpath(log)} says"
        Path(directory, "lib").rename(compiled)
    return None


if __name__ == "__main__":
    sys.exit(main())
