"""Only what pyproject.toml cannot say: cffi's own keyword that names the C shim's builder."""

from setuptools import setup

setup(cffi_modules=["sparsemem/_sys/_build.py:ffibuilder"])
