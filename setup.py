"""Computes the list of packages; everything else is in pyproject.toml.

Two packages live under another name than their directory: Hydra looks for plugins in the namespace package
``hydra_plugins``, and for our options in ``hydra_ckpt.conf``. Such a mapping cannot be combined with the automatic
discovery of pyproject.toml, and a list kept by hand would drop a new subpackage from the wheel without a word.
"""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["hydra_ckpt", "hydra_ckpt.*"]), "hydra_ckpt.conf", "hydra_plugins"],
    package_dir={"hydra_ckpt.conf": "conf", "hydra_plugins": "hydra_ckpt/_hydra_plugins"},
)
