"""FSDP2 for the reference model, one unit per layer."""

from __future__ import annotations

from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard

from moe_plugin.errors import ConfigError
from moe_plugin.models.transformer import Transformer


def shard_(network: Transformer, mesh: DeviceMesh) -> None:
    """Shards the parameters over the mesh's `data_parallel` dimension; once is enough, twice does no harm.

    Args:
        network: The network, on any device including meta.
        mesh: What Lightning's `ModelParallelStrategy` hands to `configure_model`.

    Raises:
        ConfigError: The mesh asks for tensor parallelism.
    """
    tensor_parallel = mesh["tensor_parallel"].size()
    if tensor_parallel > 1:
        raise ConfigError(
            f"'tensor_parallel_size' must be 1 for LanguageModel, got {tensor_parallel}. Set the strategy's "
            f"data_parallel_size to the number of processes and tensor_parallel_size=1."
        )
    if isinstance(network, FSDPModule):
        return
    data_parallel = mesh["data_parallel"]
    for layer in network.layers:
        fully_shard(layer, mesh=data_parallel)
    fully_shard(network, mesh=data_parallel)
