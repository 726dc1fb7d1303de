"""Compiles a model layer by layer, once its routers have been found: those are run for that, and not as in training."""

from __future__ import annotations

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from moe_plugin.errors import ConfigError
from moe_plugin.sharding import find_layers


class CompileLayers(Callback):
    """Compiles each repeated layer in place when training begins; one layer's code serves all of them."""

    def __init__(self, backend: str) -> None:
        """Take a backend of `torch.compile`.

        Raises:
            ConfigError: torch has no such backend.
        """
        known = torch.compiler.list_backends(exclude_tags=())
        if backend not in known:
            raise ConfigError("strategy.compile", f"must be null or one of {', '.join(known)}", backend)
        self.backend = backend

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Compile; the first batch waits for it."""
        for layer in find_layers(pl_module):
            layer.compile(backend=self.backend)
