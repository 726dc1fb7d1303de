from __future__ import annotations

import os

import pytest

from moe_plugin.apps.launch.process_environment import SPINS, limit_spinning


@pytest.mark.parametrize(
    ("load", "given", "chosen"),
    [
        (3.0, {}, {"OMP_WAIT_POLICY": "passive"}),
        (1.0, {}, {"GOMP_SPINCOUNT": SPINS}),
        (3.0, {"GOMP_SPINCOUNT": "7"}, {"GOMP_SPINCOUNT": "7"}),
        (1.0, {"OMP_WAIT_POLICY": "active"}, {"OMP_WAIT_POLICY": "active"}),
        (3.0, {"KMP_BLOCKTIME": "0"}, {"KMP_BLOCKTIME": "0"}),
    ],
)
def test_threads_sleep_on_a_busy_machine_unless_the_user_has_chosen(monkeypatch, load, given, chosen):
    monkeypatch.setattr(os, "environ", dict(given))
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    monkeypatch.setattr(os, "getloadavg", lambda: (load, 0.0, 0.0))
    limit_spinning()
    assert os.environ == chosen
