"""Package list: everything below lightning_mup/, conf/ as lightning_mup.conf, Hydra's sweeper. Rest: pyproject.toml."""

from setuptools import find_namespace_packages, find_packages, setup

# Hydra looks for plugins in the namespace hydra_plugins alone; an editable install needs the namespace itself listed.
plugins = find_namespace_packages(include=["hydra_plugins*"])
setup(packages=[*find_packages(include=["lightning_mup*"]), "lightning_mup.conf", *plugins])
