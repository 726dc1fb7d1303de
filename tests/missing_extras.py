"""Tries what needs an extra in an environment without extras: each is one line, exit code 2, and leaves nothing.

``make try-package`` runs it, with the wheel installed: ``ENVIRONMENT/bin/python tests/missing_extras.py``.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

LINES = {
    "moe-train logger=wandb": "wandb",
    "moe-train logger=many": "wandb",
    "moe-train logger=mlflow": "mlflow",
    "moe-train model=hf/mixtral router=native": "hf",
    "moe-train data=hf data.source.path=any": "hf",
    "moe-train -m hydra/launcher=slurm seed=1,2": "slurm",
    "moe-train -m hydra/launcher=joblib seed=1,2": "sweep",
    "moe-train -m hparams_search=optuna": "sweep",
    "moe-plan": "hf",
    "moe-simulate": "plots",
    "moe-inspect mixtral": "hf",
    "moe-report --completion bash": "completion",
}


def check(line: str, extra: str) -> None:
    """Run a line in an empty folder."""
    command, *words = line.split()
    with TemporaryDirectory() as folder:
        program = [str(Path(sys.executable).parent / command), *words]
        done = subprocess.run(program, cwd=folder, capture_output=True, text=True)
        left = list(Path(folder).iterdir())
    told = done.stderr.splitlines()
    assert done.returncode == 2, (line, done)
    assert len(told) == 1, (line, told)
    assert f"pip install 'moe_plugin[{extra}]'" in told[0], (line, told)
    assert not left, (line, left)
    print(told[0])


if __name__ == "__main__":
    for pair in LINES.items():
        check(*pair)
