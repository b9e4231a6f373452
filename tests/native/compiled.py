"""A plugin of pytest: the tests of this run meet what was compiled (`pytest -p tests.native.compiled`)."""

import native

assert native.use(), "compile first: python -m native"
