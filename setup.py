"""Adds `configs/` and `examples/` to the package, so that an installed package finds them without the repository.

Everything else is in pyproject.toml.
"""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["icet_jax", "icet_jax.*"]), "icet_jax.configs", "icet_jax.examples"],
    package_dir={"icet_jax.configs": "configs", "icet_jax.examples": "examples"},
)
