"""``torchrun -m moe_plugin.apps.train``: rank 0 reads the command line, all others take its configuration.

So there is one run folder, dated once, and no rank can train another configuration.
"""

from __future__ import annotations

import functools
import os

from omegaconf import DictConfig, OmegaConf
from torch.distributed.distributed_c10d import Store
from torch.distributed.rendezvous import rendezvous

from moe_plugin.apps.launch.process_environment import is_launched

KEY = "moe_plugin/config"
NOTHING = "null"


def is_follower() -> bool:
    """Return whether this process takes its configuration from rank 0."""
    return is_launched() and int(os.environ["RANK"]) > 0


def share(config: DictConfig) -> None:
    """Give the run's resolved configuration to the other ranks."""
    _meeting_point().set(KEY, OmegaConf.to_yaml(config))


def release() -> None:
    """Let the other ranks end if nothing was shared."""
    _meeting_point().compare_set(KEY, "", NOTHING)


def receive() -> DictConfig | None:
    """Wait for rank 0's configuration; None if there is nothing to run, as after ``--help``."""
    config = OmegaConf.create(_meeting_point().get(KEY).decode())
    return config if isinstance(config, DictConfig) and config else None


@functools.cache
def _meeting_point() -> Store:
    """Return the store that torchrun's environment variables name; cached, since rank 0 may be its host."""
    store, _, _ = next(rendezvous("env://"))
    return store
