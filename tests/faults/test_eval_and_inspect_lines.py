"""Wrong command lines of ``moe-eval`` and ``moe-inspect``: one line, exit code 2, nothing created."""

from __future__ import annotations

import io
import os
from pathlib import Path

import torch

from moe_plugin.apps import evaluate
from moe_plugin.apps.inspection.__main__ import main as inspect
from tests.faults.test_received_files import honest, refused, run

__all__ = ["honest", "run"]  # fixtures

VALUES = (
    *("foo", "a=[1", "foo=1", "data.val_batch_sise=2", "data.val_batch_size=abc", "data.val_batch_size=0"),
    *(
        "data.val_batch_size=100000",
        "data.val_batch_size=-3",
        "data.max_val_tokens=1",
        "data.context_length=32",
    ),
    *(
        "model.experts.num_experts=16",
        "model.dim=32",
        "model.num_layers=2",
        "model.num_heads=3",
        "model=null",
    ),
    *("trainer.accelerator=abc", "trainer.accelerator=gpu", "trainer.precision=7", "trainer=null", "data=3"),
    *(
        "seed=-1",
        "seed=abc",
        "data.source.root=nowhere",
        "data.source.sources={letters: 'x/*'}",
        "callbacks=3",
    ),
    *(
        "data.tokenizer._target_=moe_plugin.apps.data.BytePairs",
        "data._target_=no.such.Thing",
        "throughput=3",
    ),
    *(
        "throughput.sequences=[8,1]",
        "throughput.length=17",
        "trust=7",
        "+x=1",
        "~seed",
        "seed=1,2",
        "seed=range(3)",
    ),
    *("trainer.limit_val_batches=-1", "-m", "--foo", "ckpt_path=nope", "ckpt_path=3", "ckpt_path=null"),
    *(
        "ckpt_path=texts",
        "ckpt_path=texts/a0.txt",
        "ckpt_path=http://a.b/checkpoints/c.ckpt",
        "ckpt_path=s3://a/b",
    ),
)
CONFIGS = (
    "a: [1\n b: {",
    "",
    "[1, 2]",
    "hello",
    "seed: 0\nname: x\n",
    "\x00",
    "model: 3\ndata: []\ntrainer: x\n",
)
INSPECTED = (
    *((), ("a", "b"), ("--foo", "mixtral"), ("",), (":",), ("a:",), (":a",), ("json:loads",), ("os:getcwd",)),
    *(
        ("os:nope",),
        ("nope:x",),
        ("os.path:join",),
        ("json:",),
        ("nope.ckpt",),
        ("run",),
        ("run/config.yaml",),
    ),
    *(
        ("run/checkpoints",),
        ("texts",),
        ("texts/a0.txt",),
        ("no/such/name",),
        ("notamodel",),
        ("http://a.b/c",),
    ),
    *(("json:loads", "--verify"), ("run/checkpoints/last.ckpt", "--verify"), ("https://a.b/c.ckpt",)),
)
MODELS = (
    *("{", "[1]", "{}", '{"model_type": "evil"}', '{"model_type": "mixtral", "hidden_size": "abc"}', "\x00"),
    *('{"model_type": "mixtral", "num_local_experts": -1}', '{"model_type": 3}'),
)


def _saved(value: object) -> bytes:
    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue()


def _checkpoints(good: Path) -> list[bytes]:
    whole = torch.load(good, weights_only=False)
    return [
        *(
            _saved(whole["state_dict"]),
            _saved({"state_dict": whole["state_dict"]}),
            _saved([1]),
            _saved({"a": 1}),
        ),
        *(b"", os.urandom(1000), good.read_bytes()[:20_000]),
        *(_saved(whole | {"callbacks": {"LossFreeBalancing": state}}) for state in (3, {"sites": {}})),
    ]


def test_wrong_lines_of_moe_eval_are_one_line(run, figure):
    good, before = run / "checkpoints" / "last.ckpt", set(run.parent.rglob("*"))
    for word in VALUES:
        refused(evaluate.main, f"ckpt_path={good}", word)
    config = (run / "config.yaml").read_text()
    for text in CONFIGS:
        (run / "config.yaml").write_text(text)
        refused(evaluate.main, f"ckpt_path={good}")
    (run / "config.yaml").write_text(config)
    checkpoints = _checkpoints(good)
    for manifest in set(good.parent.glob("*last.ckpt*")) - {good}:
        manifest.unlink()
        before.discard(manifest)
    for content in checkpoints:
        good.write_bytes(content)
        refused(evaluate.main, f"ckpt_path={good}")
    assert set(run.parent.rglob("*")) == before
    lines = len(VALUES) + len(CONFIGS) + len(checkpoints)
    figure(f"wrong command lines of moe-eval: {lines} of {lines} are one line")


def test_wrong_lines_of_moe_inspect_are_one_line(run, monkeypatch, figure):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    good, before = run / "checkpoints" / "last.ckpt", set(run.parent.rglob("*"))
    for words in INSPECTED:
        refused(inspect, *words)
    assert set(run.parent.rglob("*")) == before
    for text in MODELS:
        Path("config.json").write_text(text)
        refused(inspect, ".")
    checkpoints = _checkpoints(good)[2:-2]
    for content in [_saved(torch.ones(2)), *checkpoints]:
        good.write_bytes(content)
        refused(inspect, str(good))
    for text in CONFIGS:
        (run / "config.yaml").write_text(text)
        refused(inspect, str(good))
    lines = len(INSPECTED) + len(MODELS) + len(checkpoints) + 1 + len(CONFIGS)
    figure(f"wrong command lines of moe-inspect: {lines} of {lines} are one line")
