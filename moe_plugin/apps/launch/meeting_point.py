"""Where the processes of a run meet: a store that the first machine's command holds open."""

from __future__ import annotations

import os
import time
import uuid
from types import TracebackType

from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from torch.distributed import DistError, TCPStore  # pyright: ignore[reportPrivateImportUsage]

_FAILED, _DONE = "moe_plugin/failed", "moe_plugin/done"
_LEAVING = 30.0


class MeetingPoint:
    """The store, and what the commands of a run's machines tell one another through it."""

    def __init__(self, nodes: int) -> None:
        """Take the number of machines, each of which runs this command once."""
        self.nodes = nodes
        self.node = int(os.environ.get("SLURM_NODEID", "0")) if nodes > 1 else 0

    def __enter__(self) -> MeetingPoint:
        """Open the store, or find the first machine's."""
        host, port, self.run_id = (
            ("127.0.0.1", 0, uuid.uuid4().hex) if self.nodes == 1 else slurm_meeting_point()
        )
        self._store = TCPStore(host, port, is_master=self.node == 0, wait_for_workers=False)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the store when no other machine needs it."""
        if self.nodes == 1:
            return
        try:
            self._store.add(_DONE, 1)
            until = time.monotonic() + _LEAVING
            while self.node == 0 and self._store.add(_DONE, 0) < self.nodes and time.monotonic() < until:
                time.sleep(0.1)
        except DistError:  # the first machine has left
            pass

    def places(self, ranks: int) -> list[dict[str, str]]:
        """Return the variables by which this machine's processes find all others, as torchrun sets them."""
        return [
            {
                "RANK": str(self.node * ranks + local),
                "LOCAL_RANK": str(local),
                "GROUP_RANK": str(self.node),
                "WORLD_SIZE": str(self.nodes * ranks),
                "LOCAL_WORLD_SIZE": str(ranks),
                "GROUP_WORLD_SIZE": str(self.nodes),
                "MASTER_ADDR": self._store.host,
                "MASTER_PORT": str(self._store.port),
                "TORCHELASTIC_RUN_ID": self.run_id,
                "TORCHELASTIC_RESTART_COUNT": "0",
                "TORCHELASTIC_MAX_RESTARTS": "0",
                "TORCHELASTIC_USE_AGENT_STORE": "True",
            }
            for local in range(ranks)
        ]

    def tell_failure(self) -> None:
        """Let the other machines end too."""
        if self.nodes > 1:
            self._store.set(_FAILED, "yes")

    def has_failed(self) -> bool:
        """Return whether another machine's processes have failed, or it is gone."""
        if self.nodes == 1:
            return False
        try:
            return self._store.check([_FAILED])
        except DistError:
            return True


def slurm_meeting_point() -> tuple[str, int, str]:
    """Return where the machines of a SLURM job meet, host and port, and under what name."""
    host = SLURMEnvironment.resolve_root_node_address(os.environ["SLURM_JOB_NODELIST"])
    job_id = os.environ["SLURM_JOB_ID"]
    return host, 15000 + int(job_id) % 10000, job_id
