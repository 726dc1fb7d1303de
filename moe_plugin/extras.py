"""Optional packages, and the extra of moe_plugin that installs each."""

from __future__ import annotations

from importlib.util import find_spec

from moe_plugin.errors import ConfigError

EXTRAS = {
    "jinja2": "plots",
    "matplotlib": "plots",
    "wandb": "wandb",
    "mlflow": "mlflow",
    "shtab": "completion",
    "datasets": "hf",
    "tokenizers": "hf",
    "transformers": "hf",
    "triton": "triton",
    "hydra_plugins.hydra_submitit_launcher": "slurm",
    "hydra_plugins.hydra_joblib_launcher": "sweep",
    "hydra_plugins.hydra_optuna_sweeper": "sweep",
}
"""The extra of each package, by the name it is imported under."""


def require(package: str, name: str) -> None:
    """Check that an optional package is installed.

    Args:
        package: The name it is imported under.
        name: What needs it, such as a command or a key of the configuration.

    Raises:
        ConfigError: It is missing; the error names what to install.
    """
    if find_spec(package) is None:
        distribution = package.rpartition(".")[2].replace("_", "-")
        wanted = f"'moe_plugin[{EXTRAS[package]}]'" if package in EXTRAS else distribution
        raise ConfigError(name, f"needs the package {distribution!r}", fix=f"Run: pip install {wanted}.")
