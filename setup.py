"""Everything is in pyproject.toml except this: a wheel carries `configs/` inside the package, so that
`--config=configs/NAME.py` is found where no repository is."""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["icet_jax", "icet_jax.*"]), "icet_jax.configs"],
    package_dir={"icet_jax.configs": "configs"},
)
