"""docs/tags.md has the tags that a run writes, and no others."""

from __future__ import annotations

import re

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from moe_plugin.apps.train import main
from tests.docs.pages import ROOT

# A layer of 8 experts has no groups of more ranks, and nothing was wrong.
NOT_IN_A_SMALL_RUN = {"load/slowdown_ep16", "load/slowdown_ep64", "alarms"}
LAYOUT = "custom_scalars__config__"
ROUTER = r"network\.layers\.\d+\.feed_forward\.router|layers\.\d+"
SMALL = [
    *("experiment=smoke", "router=top_p", "model.dim=16", "model.num_heads=2", "experts.hidden_dim=16"),
    *(
        "model.num_layers=3",
        "trainer.max_steps=8",
        "trainer.val_check_interval=4",
        "trainer.log_every_n_steps=2",
    ),
    *("data=files", "data.context_length=32", "data.batch_size=8", "data.val_batch_size=8"),
    *("callbacks.progress_bar=null", "trainer.enable_progress_bar=false", "trainer.accelerator=cpu"),
]


def documented() -> set[str]:
    """Return the tags in the first column of the page's tables."""
    cells = re.findall(r"^\| (`.*?) \|", (ROOT / "docs" / "tags.md").read_text(), re.MULTILINE)
    return {tag for cell in cells for tag in re.findall(r"`([^`]+)`", cell)}


@pytest.fixture(scope="module")
def logged(tmp_path_factory) -> set[str]:
    """Return the tags of a small run whose tokens use different numbers of experts."""
    folder = tmp_path_factory.mktemp("run")
    for name, text in {"py": "def f(x):\n    return x + 12\n", "txt": "Some words, and more. "}.items():
        for copy in ("a", "b"):
            (folder / f"{copy}.{name}").write_text(f"{copy} = 1\n" + text * 400)
    source = f"data.source.sources={{code: {folder}/*.py, prose: {folder}/*.txt}}"
    main([*SMALL, source, f"data.cache={folder}", f"hydra.run.dir={folder}/run"])
    events = EventAccumulator(str(folder / "run" / "tensorboard"))
    events.Reload()
    found = events.Tags()
    tags = {tag for kind in ("scalars", "images", "tensors", "histograms") for tag in found[kind]}
    return {re.sub(ROUTER, "ROUTER", tag).removesuffix("/text_summary") for tag in tags - {LAYOUT}}


class TestTags:
    def test_every_tag_of_a_run_is_documented(self, logged):
        assert logged - documented() == set()

    def test_every_documented_tag_is_one_of_a_run(self, logged):
        assert documented() - logged == NOT_IN_A_SMALL_RUN
