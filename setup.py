"""All settings are in setup.cfg; this file lets older versions of pip install the package."""

from setuptools import setup

setup()
