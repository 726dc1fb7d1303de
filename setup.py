"""Adds the YAML files: conf/ as moe_plugin.conf, and the groups for any Hydra app; all else is in pyproject.toml."""

from setuptools import find_namespace_packages, setup

setup(
    packages=[
        *find_namespace_packages(include=["moe_plugin", "moe_plugin.*", "hydra_plugins", "hydra_plugins.*"]),
        "moe_plugin.conf",
        *(f"moe_plugin.conf.{group}" for group in find_namespace_packages("conf")),
    ],
    package_dir={"moe_plugin.conf": "conf"},
    package_data={"": ["*.yaml"], "moe_plugin": ["py.typed"], "moe_plugin.apps.report": ["*.html"]},
)
