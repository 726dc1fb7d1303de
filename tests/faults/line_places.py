"""The files that the command lines of the battery find where they run: good ones, and ones that are damaged."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

from tests.apps.launch.small_job import write_texts

BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 12)
)
ARMS = "experiment: smoke\nseeds: 1\nreference: one\narms: {one: []}\n"
STUDIES: dict[str, str | bytes] = {
    "study": ARMS,
    "malformed": "experiment: [1\nseeds: {",
    "binary": bytes(range(256)) * 4,
    "empty": "",
    "list": "[1, 2]\n",
    "bomb": BOMB,
    "keys": "experiment: smoke\nseeds: 1\n",
    "seeds_0": ARMS.replace("seeds: 1", "seeds: 0"),
    "seeds_negative": ARMS.replace("seeds: 1", "seeds: -1"),
    "seeds_text": ARMS.replace("seeds: 1", "seeds: three"),
    "fewer_negative": ARMS + "fewer_seeds: {one: -1}\n",
    "fewer_list": ARMS + "fewer_seeds: [one]\n",
    "reference": ARMS.replace("reference: one", "reference: two"),
    "no_arms": ARMS.replace("arms: {one: []}", "arms: {}"),
    "arms_list": ARMS.replace("{one: []}", "[one]"),
    "arm_text": ARMS.replace("{one: []}", "{one: rule=sign}"),
    "arm_numbers": ARMS.replace("{one: []}", "{one: [1, 2]}"),
    "arm_slash": ARMS.replace("one", "../one"),
    "experiment": ARMS.replace("smoke", "nope"),
    "arm_typo": ARMS.replace("{one: []}", "{one: [trainer.max_step=3]}"),
}
SUMMARY = {
    **dict.fromkeys(("val_loss", "perplexity", "max_violation_batch", "max_violation_global"), 1.5),
    **{"dead_experts": 0, "tokens_per_second": 10.0, "seconds": 2.0, "seed": 0},
    **{"parameters_total": 100, "parameters_active": 50},
}


def furnish_(command: str) -> None:
    """Fills the working folder with what the lines of a command need."""
    Path("file.txt").write_text("some text\n")
    Path("folder.yaml").mkdir()
    FURNISHERS.get(command, lambda: None)()


def _for_train() -> None:
    write_texts(Path())
    Path("empty.ckpt").touch()
    Path("broken_conf", "model").mkdir(parents=True)
    Path("broken_conf", "model", "broken.yaml").write_text("_target_: [\n")
    # Of a model that is half as wide; a zip file that torch writes.
    shutil.copy(os.environ["OTHER_CHECKPOINT"], "other.ckpt")


def _for_study() -> None:
    write_texts(Path())
    for name, text in STUDIES.items():
        Path(f"{name}.yaml").write_bytes(text if isinstance(text, bytes) else text.encode())
    os.mkfifo("pipe.yaml")


def _for_report() -> None:
    Path("folder").mkdir()
    Path("empty").mkdir()
    for folder in ("good", "other/good", "a=b", "sweep/seed=1", "sweep/seed=2"):
        run(Path(folder))
    for name, (file, content) in DAMAGED.items():
        run(Path(name))
        Path(name, file).write_bytes(content if isinstance(content, bytes) else content.encode())
    for name in ("bad_events", "cut_events", "cut_short"):
        Path(name).mkdir()
        shutil.copy(os.environ["EVENTS"], Path(name, "events.out.tfevents.1.host.1.0"))
    events = Path("bad_events", "events.out.tfevents.1.host.1.0")
    events.write_bytes(
        bytes(byte ^ 255 if place % 7 == 3 else byte for place, byte in enumerate(events.read_bytes()))
    )
    events = Path("cut_events", "events.out.tfevents.1.host.1.0")
    events.write_bytes(events.read_bytes()[:5])
    events = Path("cut_short", "events.out.tfevents.1.host.1.0")
    events.write_bytes(events.read_bytes()[:-5])


def run(folder: Path) -> None:
    """Writes the files of a finished run."""
    folder.mkdir(parents=True)
    (folder / "metrics.csv").write_text("epoch,step,train/loss,val/loss\n0,1,2.5,\n0,2,,2.25\n")
    (folder / "summary.json").write_text(json.dumps(SUMMARY))
    (folder / "config.yaml").write_text("seed: 0\nmodel: {dim: 8}\n")
    (folder / "environment.json").write_text('{"torch": "2.11"}')


DAMAGED: dict[str, tuple[str, str | bytes]] = {
    "bad_summary": ("summary.json", '{"val_loss": 1.5,'),
    "list_summary": ("summary.json", "[1, 2]"),
    "text_summary": ("summary.json", '{"val_loss": "low"}'),
    "binary_summary": ("summary.json", bytes(range(256))),
    "nested_summary": ("summary.json", "[" * 100_000),
    "bad_config": ("config.yaml", "model: [1\nseed: {"),
    "bomb_config": ("config.yaml", BOMB),
    "bad_environment": ("environment.json", "{"),
    "list_environment": ("environment.json", "[1]"),
    "bad_use": ("expert_use.json", "{"),
    "bad_table": ("metrics.csv", "epoch,step,train/loss\n0,one,2.5\n"),
    "words_table": ("metrics.csv", "epoch,step,train/loss\n0,1,low\n"),
    "binary_table": ("metrics.csv", bytes(range(256)) * 3),
}
FURNISHERS: dict[str, Callable[[], None]] = {
    "moe-train": _for_train,
    "moe-study": _for_study,
    "moe-report": _for_report,
}
