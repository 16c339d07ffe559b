"""Package list: everything below lightning_mup/, and conf/ as lightning_mup.conf. All else is in pyproject.toml."""

from setuptools import find_packages, setup

setup(packages=[*find_packages(include=["lightning_mup*"]), "lightning_mup.conf"])
