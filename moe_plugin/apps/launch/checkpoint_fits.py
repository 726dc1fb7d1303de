"""Compares a checkpoint's shapes with the model's, before torch lists every tensor that doesn't fit."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from moe_plugin.attach.discovery.routed_experts import find_routed_experts
from moe_plugin.checkpoints.sharded import shapes_in
from moe_plugin.errors import CheckpointError


def check_checkpoint_fits(model: nn.Module, path: str | Path, *, trusted: bool = False) -> None:
    """Check that a checkpoint is of this model: that each layer has as many experts, and that shapes are the same.

    Args:
        model: The model; the meta device is enough.
        path: A checkpoint, a file or a folder.
        trusted: It is the user's own: it may hold any object, whose code then runs.

    Raises:
        CheckpointError: They differ; it names both numbers for each such layer, or the first other shape.
    """
    shapes, names = shapes_in(path, trusted=trusted), {module: name for name, module in model.named_modules()}
    wrong = []
    for routed in find_routed_experts(model):
        block = names[routed.module].rpartition(".")[0]
        for name, parameter in model.get_submodule(block).named_parameters(prefix=block):
            is_router = parameter.ndim == 2 and len(parameter) == routed.num_experts
            if is_router and name in shapes and len(shapes[name]) != 0 and shapes[name][0] != len(parameter):
                wrong.append(f"{block}: {shapes[name][0]} in the checkpoint, {len(parameter)} in the model")
                break
    if wrong:
        raise CheckpointError(f"'ckpt_path' has other numbers of experts. {'; '.join(wrong)}.")
    parameters = dict(model.named_parameters())
    if not parameters.keys() & shapes.keys():
        raise CheckpointError(f"'ckpt_path' must be a checkpoint of this model, got {str(path)!r}.")
    for name, parameter in parameters.items():
        if name in shapes and len(shapes[name]) and shapes[name] != parameter.shape:
            stored, wanted = (" x ".join(map(str, shape)) for shape in (shapes[name], parameter.shape))
            raise CheckpointError(
                f"'ckpt_path' is of another model. {name}: {stored} in the checkpoint, {wanted} in the model."
            )
