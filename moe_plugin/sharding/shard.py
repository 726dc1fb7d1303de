"""FSDP2 for any model: one unit per repeated layer, one for the rest."""

from __future__ import annotations

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard

from moe_plugin.attach.discovery.understand import BIAS_NAMES
from moe_plugin.errors import ConfigError
from moe_plugin.experts import expert_mesh, parallelize_experts_
from moe_plugin.sharding.layers import find_layers


def shard_(model: nn.Module, mesh: DeviceMesh, *, expert_parallel_size: int = 1) -> None:
    """Shard the parameters of ``model`` over the data-parallel ranks, in place; a second call changes nothing.

    Parameters, gradients and optimizer states are spread layer by layer (FSDP2, `torch.distributed.fsdp.fully_shard`).
    Call it in Lightning's `configure_model`, before the optimizer is made:

    Examples:
        >>> class Project(lightning.LightningModule):  # doctest: +SKIP
        ...     def configure_model(self):
        ...         if self.device_mesh is not None:
        ...             moe_plugin.shard_(self.model, self.device_mesh)

    Selection biases that the model owns as parameters stay whole on every rank: they are a few bytes that change
    between steps, and have no gradient.

    Args:
        model: The network that ``training_step`` calls, on any device including meta. Its layers are found by their
            structure, see `find_layers`; a model that repeats nothing becomes a single unit.
        mesh: One dimension, or several with one named ``data_parallel``, which is used.
        expert_parallel_size: Ranks among which the experts of each layer are divided, and their tokens exchanged; see
            `moe_plugin.experts.parallelize_experts_`.

    Raises:
        ConfigError: 'model' is a LightningModule, 'mesh' has several dimensions and none of that name, or the experts
            cannot be divided.
    """
    if hasattr(model, "training_step"):
        fix = "Pass the module that it holds: shard_(self.model, self.device_mesh)."
        raise ConfigError("model", "must be the network that training_step calls", type(model).__name__, fix)
    if isinstance(model, FSDPModule):
        return
    # FSDP fails on parameters without elements, such as those of transformers' DeepSeek-V3 without shared experts.
    ignored = {
        parameter
        for name, parameter in model.named_parameters()
        if name.rpartition(".")[2] in BIAS_NAMES or not parameter.numel()
    }
    if expert_parallel_size > 1:
        ignored |= parallelize_experts_(model, expert_mesh(_data_parallel(mesh), expert_parallel_size))
    for unit in [*find_layers(model), model]:
        fully_shard(unit, mesh=_data_parallel(mesh), ignored_params=ignored)


def _data_parallel(mesh: DeviceMesh) -> DeviceMesh:
    names = mesh.mesh_dim_names or ()
    if "data_parallel" in names:
        return mesh["data_parallel"]
    if mesh.ndim > 1:
        raise ConfigError("mesh", "must have one dimension or one named 'data_parallel'", mesh)
    return mesh
