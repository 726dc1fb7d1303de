"""Make the pictures of docs/load_plots.md: ``python -m docs.generate.load_plots``, four runs of half a minute each.

Trains a small model that is balanced well, too slowly, too fast and not at all. Copies the pictures that TensorBoard
shows of one layer, and draws MaxVio of all four.
"""

from __future__ import annotations

import os
import subprocess
import sys
from io import BytesIO
from pathlib import Path

from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

RUNS, PICTURES = Path("runs/load_plots"), Path(__file__).parents[1] / "load_plots"
ARMS = {
    "healthy": [],
    "slow": ["rule=sign", "rule.rate=0.0005"],
    "oscillating": ["rule.rate=0.3"],
    "collapsed": ["balancing=none"],
}
COMMON = [
    "experiment=study",
    "model.dim=64",
    "experts.hidden_dim=64",
    "trainer.max_steps=160",
    "trainer.val_check_interval=160",
    "trainer.log_every_n_steps=4",
    "data.max_train_tokens=2000000",
    "data.max_val_tokens=16384",
    "callbacks.load_monitor.image_every_n_steps=null",
]
KINDS = ("load_over_time/", "bias_over_time/", "load/experts")
"""How the tags of the pictures begin; the first layer's is taken."""
CURVES = ("load/max_violation_batch", "load/max_violation_global", "load/bias_range", "load/flip_rate")


def main() -> None:
    """Train the runs that are not there yet, and draw them."""
    PICTURES.mkdir(exist_ok=True)
    events = {name: _events(_train(name, words)) for name, words in ARMS.items()}
    for name, found in events.items():
        for kind in KINDS:
            tag = next((tag for tag in found.Tags()["images"] if tag.startswith(kind)), None)
            if tag is not None:
                picture = PICTURES / f"{name}_{kind.strip('/').replace('/', '_')}.png"
                picture.write_bytes(found.Images(tag)[-1].encoded_image_string)
    _draw(events, PICTURES / "curves.png")


def _train(name: str, words: list[str]) -> Path:
    folder = RUNS / name
    if not (folder / "summary.json").exists():
        command = [sys.executable, "-m", "moe_plugin.apps.train", *COMMON, *words]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        subprocess.run([*command, f"hydra.run.dir={folder}", "ckpt_path=last"], env=environment, check=True)
    return folder / "tensorboard"


def _events(folder: Path) -> EventAccumulator:
    events = EventAccumulator(str(folder), size_guidance={"images": 0, "scalars": 0})
    events.Reload()
    return events


def _draw(events: dict[str, EventAccumulator], out: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 6), layout="constrained")
    for axes, tag in zip(figure.subplots(2, 2).flat, CURVES, strict=True):
        for name, found in events.items():
            scalars = found.Scalars(tag) if tag in found.Tags()["scalars"] else []
            values = [each.value for each in scalars]
            axes.plot([each.step for each in scalars], values, label=name, linewidth=1.5)
        axes.set_title(tag, fontsize=10)
        axes.set_xlabel("step", fontsize=9)
        axes.grid(alpha=0.3)
    figure.axes[0].legend(fontsize=9)
    drawn = BytesIO()
    figure.savefig(drawn, dpi=100)
    Image.open(drawn).convert("RGB").quantize(32).save(out, optimize=True)  # a fifth of the bytes


if __name__ == "__main__":
    main()
