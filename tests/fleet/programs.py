"""Programs that tests need and Python does not bring."""

import os
import shutil

import pytest


def needed(program: str, package: str) -> str:
    """Where `program` is; the test fails with one line that says what to install when it is nowhere."""
    found = shutil.which(program, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")
    if found is None:
        pytest.fail(f"{program} is needed for this test: install it with 'apt-get install {package}'", pytrace=False)
    return found
