"""How a trained bias reaches inference.

Shape legend: E experts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from moe_plugin.attach.sidecar import write_sidecar
from moe_plugin.attach.site import Site
from moe_plugin.errors import AttachError


@dataclass(frozen=True)
class Export:
    """Where inference finds the trained biases; as text, what to do.

    Attributes:
        in_checkpoint: Routers whose bias is a tensor of the model: ``save_pretrained`` writes it, and any engine that
            supports the model reads it.
        in_sidecar: Routers whose bias only the sidecar holds.
        sidecar: The file, if it was asked for and is needed.
    """

    in_checkpoint: tuple[str, ...]
    in_sidecar: tuple[str, ...]
    sidecar: Path | None = None

    def __str__(self) -> str:
        """Return what inference has to do."""
        owned, ours = len(self.in_checkpoint), len(self.in_sidecar)
        own_words = f"{owned} of {owned + ours} biases are in the model's own checkpoint"
        if not ours:
            return f"{own_words}: load the model as always, moe_plugin is not needed."
        file = self.sidecar or "the file of export(model, path)"
        return f"{own_words}. For all of them: balance_(model, rule=None).load({str(file)!r}) after loading the model."


def export(
    root: nn.Module, sites: Mapping[str, Site], step: int, model: nn.Module | None, path: Path | None
) -> Export:
    """Describe where the biases are, and write those that the model does not own; see `BalancedModel.export`."""
    prefix = _prefix(root, root if model is None else model)
    inside = {name.removeprefix(prefix): site for name, site in sites.items() if name.startswith(prefix)}
    in_checkpoint = tuple(name for name, site in inside.items() if site.host_owns_bias)
    in_sidecar = tuple(name for name, site in inside.items() if not site.host_owns_bias)
    if path is None or not in_sidecar:
        return Export(in_checkpoint, in_sidecar)
    write_sidecar(
        path, {"step": step, "sites": {n: {"bias": s.bias, "state": {}} for n, s in inside.items()}}
    )
    return Export(in_checkpoint, in_sidecar, path)


def _prefix(root: nn.Module, model: nn.Module) -> str:
    """Return the prefix that the names of ``model``'s modules have in the root."""
    for name, module in root.named_modules():
        if module is model:
            return f"{name}." if name else ""
    raise AttachError(
        f"'model' must be the balanced {type(root).__name__} or a part of it, got {type(model).__name__}."
    )
