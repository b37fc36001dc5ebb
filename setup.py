"""Lets tools that call `setup.py` build the package; everything about it is stated in `pyproject.toml`."""

from setuptools import setup

setup()
