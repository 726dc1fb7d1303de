"""ViTPose++: the caller chooses an image's expert by its dataset."""

from __future__ import annotations

from moe_plugin.attach.adapter import Adapter

ADAPTER = Adapter(
    block="VitPoseNaiveMoe", refused="takes its expert from 'dataset_index': there is no router"
)
