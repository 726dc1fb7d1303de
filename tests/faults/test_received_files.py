"""Files that somebody sent, each with a canary: nothing of theirs runs, writes, asks, waits or reaches the terminal."""

from __future__ import annotations

import io
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

import pytest
import torch
import yaml
from hydra.utils import instantiate

from moe_plugin.apps import evaluate, train
from moe_plugin.apps.inspection.__main__ import main as inspect
from moe_plugin.apps.report.__main__ import main as report
from tests.apps.launch.small_job import WORDS, write_texts
from tests.faults.hostile_targets import MISPLACED, SILENT, singing

PLACES = (
    *(
        "model",
        "data",
        "data.source",
        "callbacks.evil",
        "logger.evil",
        "trainer.profiler",
        "rule",
        "hydra.launcher",
    ),
    *(
        "strategy.lightning",
        "model.optimizer",
        "model.router.score",
        "callbacks.loss_free.rule",
        "anything.at.all",
    ),
)
SECRET = "hunter2"
LIMIT = 60
"""Seconds after which a command counts as waiting for ever."""


@pytest.fixture(scope="module")
def honest(tmp_path_factory) -> Path:
    """A folder with texts and a finished run of ours."""
    folder = tmp_path_factory.mktemp("honest")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("MOE_PLUGIN_CACHE", str(folder / "cache"))
        write_texts(folder)
        with redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            train.main([*WORDS, "hydra.run.dir=run"])
    return folder


@pytest.fixture
def run(honest, tmp_path, monkeypatch) -> Path:
    """A copy of the run that may be changed; the cache is the user's."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MOE_PLUGIN_CACHE", str(honest / "cache"))
    monkeypatch.setenv("SECRET", SECRET)
    for name in ("texts", "run"):
        shutil.copytree(honest / name, tmp_path / name)
    return tmp_path / "run"


@pytest.fixture(scope="module")
def count() -> Counter[str]:
    """How many canaries the tests have planted so far, and how many are untouched."""
    return Counter()


@pytest.fixture
def untouched(count) -> Callable[[int], None]:
    """Adds canaries at the end of a test; one that fails has told which."""
    return lambda number: count.update(untouched=number)


def called(main: Callable[[list[str]], Any], *words: str) -> tuple[Any, str]:
    """Returns the exit code and everything that a command printed."""
    text = io.StringIO()
    with redirect_stdout(text), redirect_stderr(text), warnings.catch_warnings(), _ends():
        warnings.simplefilter("ignore")
        try:
            code = main(list(words))
        except SystemExit as end:
            code = end.code
    return code, text.getvalue()


@contextmanager
def _ends() -> Iterator[None]:
    def late(*args: object) -> None:
        raise AssertionError("waits for ever")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(LIMIT)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def refused(main: Callable[[list[str]], Any], *words: str) -> str:
    """Returns the line with which a command refuses a file."""
    code, text = called(main, *words)
    assert code == 2, text
    assert text.count("\n") == 1, text
    assert text.startswith("error: "), text
    assert SECRET not in text
    assert all(c.isprintable() for c in text.removesuffix("\n"))
    return text


def evaluated(run: Path, *words: str) -> tuple[str, ...]:
    return (f"ckpt_path={run}/checkpoints/last.ckpt", *words)


def change(run: Path, key: str, value: Any) -> None:
    """Plants a value in the run's configuration."""
    config = yaml.safe_load((run / "config.yaml").read_text())
    node, (*parents, name) = config, key.split(".")
    for parent in parents:
        if not isinstance(node.get(parent), dict):
            node[parent] = {}
        node = node[parent]
    node[name] = value
    (run / "config.yaml").write_text(yaml.safe_dump(config))


class TestTargets:
    def test_canaries_of_called_targets_sing(self, tmp_path, figure):
        (tmp_path / "scratch").mkdir()
        targets = singing(tmp_path / "canary", tmp_path / "scratch")
        sung = 0
        for place, target in enumerate(targets):
            canary = tmp_path / f"canary{place}"
            child = os.fork()
            if child == 0:
                with suppress(BaseException):
                    named = singing(canary, tmp_path / "scratch")[target]
                    resolve_name(target)(*named.pop("_args_", ()), **named)
                os._exit(0)
            os.waitpid(child, 0)
            sung += os.path.lexists(canary)
        figure(f"canaries of targets that sing when called: {sung} of {len(targets)}")
        assert sung == len(targets)

    def test_foreign_targets_are_refused_before_anything_is_imported(self, run, tmp_path, figure, untouched):
        (tmp_path / "scratch").mkdir()
        canary, original = tmp_path / "canary", (run / "config.yaml").read_text()
        nodes = singing(canary, tmp_path / "scratch") | {target: {} for target in SILENT}
        absent = {target.split(".")[0] for target in nodes} - set(sys.modules)
        cases = [(PLACES[i % len(PLACES)], target, node) for i, (target, node) in enumerate(nodes.items())]
        cases += [(place, target, {}) for place, targets in MISPLACED.items() for target in targets]
        for place, target, node in cases:
            (run / "config.yaml").write_text(original)
            change(run, place, {"_target_": target, "_partial_": False, **node})
            line = refused(evaluate.main, *evaluated(run))
            assert f"'{place}." in line
            assert repr(target).strip("'") in line or "_args_" in line
            refused(inspect, f"{run}/checkpoints/last.ckpt")
            assert not os.path.lexists(canary)
        assert absent.isdisjoint(sys.modules)
        assert "trust" in line
        untouched(2 * len(cases))
        figure(f"foreign targets: {len(cases)} of {len(cases)} refused, nothing imported")
        assert len(cases) >= 74

    @pytest.mark.parametrize(
        "value",
        [
            {"a": {"_target_": "os.system", "command": "true"}},
            [[{"_target_": "os.system"}]],
            {"_target_": ["os.system"]},
            {"_target_": {"_target_": "os.system"}},
            {"_target_": 3},
            {"_target_": None},
            {"_target_": "moe_plugin.routing.Sigmoid", "_args_": [1]},
            {"_target_": "transformers.MixtralConfig", "attn_implementation": "somebody/kernel"},
            {"_target_": "transformers.MixtralConfig", "auto_map": {"AutoModel": "somebody/code--m.M"}},
            {"_target_": "moe_plugin.apps.data.HuggingFace", "path": "json", "data_files": "https://a.b/c"},
        ],
    )
    def test_hidden_target_is_refused(self, run, value, untouched):
        change(run, "model.hidden", value)
        refused(evaluate.main, *evaluated(run))
        untouched(1)

    def test_what_the_user_types_is_free(self, run):
        change(run, "data._target_", "my.Data")
        words = evaluated(run, "data._target_=moe_plugin.apps.data.CorpusDataModule")
        assert called(evaluate.main, *words)[0] is None
        words = evaluated(run, "model._target_=tests.apps.launch.small_job.NoisyModel")
        assert called(evaluate.main, *words)[0] is not None
        change(run, "data._target_", "moe_plugin.apps.data.CorpusDataModule")
        assert called(evaluate.main, *words)[0] is None


class TestArguments:
    def test_allowed_classes_write_nothing_outside_of_the_run(self, run, tmp_path, untouched):
        outside = tmp_path / "outside"
        nodes = {
            "callbacks.a": {
                "_target_": "lightning.pytorch.callbacks.ModelCheckpoint",
                "dirpath": f"{outside}/a",
            },
            "callbacks.b": {
                "_target_": "lightning.pytorch.callbacks.OnExceptionCheckpoint",
                "dirpath": f"{outside}/b",
            },
            "callbacks.c": {
                "_target_": "moe_plugin.apps.launch.last_checkpoint.LastCheckpoint",
                "path": f"{outside}/c",
            },
            "callbacks.d": {"_target_": "lightning.pytorch.callbacks.BatchSizeFinder"},
            "logger.e": {"_target_": "lightning.pytorch.loggers.CSVLogger", "save_dir": f"{outside}/e"},
            "logger.f": {
                "_target_": "lightning.pytorch.loggers.TensorBoardLogger",
                "save_dir": f"{outside}/f",
            },
            "trainer.profiler": {
                "_target_": "lightning.pytorch.profilers.SimpleProfiler",
                "dirpath": str(outside / "g"),
                "filename": "g",
            },
            "trainer.default_root_dir": str(outside / "h"),
            "trainer.plugins": [],
            "data.cache": str(outside / "i"),
            "paths.output": str(outside / "j"),
            "paths.runs": str(outside / "k"),
            "trust": True,
        }
        for key, node in nodes.items():
            change(run, key, node)
        before = _files(tmp_path)
        code, text = called(evaluate.main, *evaluated(run))
        assert code is None, text
        assert _files(tmp_path) - before == {run / "eval_last.json"}
        loss = json.loads((run / "eval_last.json").read_text())["val_loss"]
        assert loss == json.loads((run / "summary.json").read_text())["val_loss"]
        assert called(evaluate.main, *evaluated(run, "trust=true", "callbacks={}"))[0] is None
        assert {path.name for path in outside.iterdir()} >= {"g", "i"}  # these canaries are alive
        untouched(len(nodes))

    @pytest.mark.parametrize(
        "key", ["name", "data.source.root", "model.dim", "paths.runs", "callbacks.x", "seed"]
    )
    @pytest.mark.parametrize("value", ["${oc.env:SECRET}", "a${oc.decode:${oc.env:SECRET}}", "${seed}"])
    def test_nothing_is_looked_up(self, run, key, value, untouched):
        change(run, key, value)
        line = refused(evaluate.main, *evaluated(run))
        assert f"'{key}'" in line
        refused(inspect, f"{run}/checkpoints/last.ckpt")
        untouched(1)


def _files(folder: Path) -> set[Path]:
    return {path for path in folder.rglob("*") if not path.is_dir()}


class Call:
    """Calls a function when it is unpickled."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.function, self.arguments = function, arguments

    def __reduce__(self):
        return self.function, self.arguments


def payloads(canary: Path) -> tuple[Call, ...]:
    """Returns what creates the canary when it is unpickled."""
    path, made = str(canary), f"__import__('os').mkdir({str(canary)!r})"
    return (
        *(
            Call(os.mkdir, path),
            Call(os.makedirs, path),
            Call(os.system, f"touch {path}"),
            Call(open, path, "w"),
        ),
        *(Call(eval, made), Call(exec, made), Call(subprocess.call, ["touch", path]), Call(os.mkfifo, path)),
        *(Call(subprocess.getoutput, f"touch {path}"), Call(io.open, path, "w"), Call(os.symlink, "/", path)),
        *(Call(shutil.copyfile, __file__, path), Call(torch.save, 1, path), Call(Path(path).touch)),
        *(Call(instantiate, {"_target_": "os.mkdir", "path": path}), Call(shutil.copy, __file__, path)),
    )


class TestPickles:
    def test_pickles_run_nothing(self, run, tmp_path, untouched):
        checkpoint, canary = run / "checkpoints" / "last.ckpt", tmp_path / "canary"
        whole = torch.load(checkpoint, weights_only=False)
        hidden = payloads(canary)
        for i, call in enumerate(hidden):
            for manifest in checkpoint.parent.glob(f"*{checkpoint.name}*"):
                manifest.unlink()
            is_zip = i % 4 > 0
            torch.save(whole | {"extra": call}, checkpoint, _use_new_zipfile_serialization=is_zip)
            for main, words in ((evaluate.main, evaluated(run)), (inspect, (str(checkpoint),))):
                line = refused(main, *words)
                assert not os.path.lexists(canary)
                assert "trust" in line or not is_zip
        words = [*WORDS, f"ckpt_path={checkpoint}", "hydra.run.dir=again"]
        assert "trust" in refused(train.main, *words)
        assert not os.path.lexists(canary)
        assert not Path("again").exists()
        assert called(evaluate.main, *evaluated(run, "trust=true"))[0] is None
        assert os.path.lexists(canary)  # this canary is alive
        untouched(2 * len(hidden) + 1)

    def test_honest_sharded_checkpoint_is_evaluated(self, run):
        checkpoint = run / "checkpoints" / "last.ckpt"
        whole = torch.load(checkpoint, weights_only=False)
        shutil.rmtree(checkpoint.parent)
        _save_folder(checkpoint, whole, "nowhere", Call(os.mkdir))
        assert called(evaluate.main, *evaluated(run))[0] is None

    @pytest.mark.parametrize("kind", ["meta.pt", ".metadata", "weights", "byte entry"])
    def test_sharded_checkpoint_runs_nothing(self, run, tmp_path, kind, untouched):
        checkpoint, canary = run / "checkpoints" / "last.ckpt", tmp_path / "canary"
        whole = torch.load(checkpoint, weights_only=False)
        shutil.rmtree(checkpoint.parent)
        _save_folder(checkpoint, whole, kind, Call(os.mkdir, str(canary)))
        refused(evaluate.main, *evaluated(run))
        called(inspect, str(checkpoint))
        assert not canary.exists()
        untouched(2)

    def test_model_folder_runs_nothing(self, tmp_path, monkeypatch, untouched):
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
        canary, folder = tmp_path / "canary", tmp_path / "model"
        folder.mkdir()
        code = f"import os\nos.mkdir({str(canary)!r})\nclass C: pass\n"
        for name in ("modeling_evil.py", "configuration_evil.py"):
            (folder / name).write_text(code)
        torch.save({"a": Call(os.mkdir, str(canary))}, folder / "pytorch_model.bin")
        auto = {"AutoConfig": "configuration_evil.C", "AutoModelForCausalLM": "modeling_evil.C"}
        small = {
            "hidden_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
        }
        for kind in ("mixtral", "evil"):
            settings = {
                "model_type": kind,
                "auto_map": auto,
                **small,
                "attn_implementation": "somebody/kernel",
            }
            (folder / "config.json").write_text(json.dumps(settings))
            assert called(inspect, str(folder))[0] in (0, 2)
            assert not canary.exists()
        untouched(6)


def _save_folder(path: Path, whole: dict[str, Any], kind: str, call: Call) -> None:
    import torch.distributed.checkpoint as dcp

    rest = dict(whole)
    parts = {"state_dict": rest.pop("state_dict")}
    rest.pop("optimizer_states")
    names = list(parts["state_dict"])
    group = {"lr": call if kind == "byte entry" else 0.1, "params": names}
    parts["optimizer_0"] = {"state": {}, "param_groups": [group]}
    if kind == "weights":
        parts["state_dict"] |= {"extra": call}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        dcp.save(parts, checkpoint_id=path, no_dist=True)
    torch.save(rest | ({"extra": call} if kind == "meta.pt" else {}), path / "meta.pt")
    if kind == ".metadata":
        metadata = pickle.loads((path / ".metadata").read_bytes())
        metadata.version = call
        (path / ".metadata").write_bytes(pickle.dumps(metadata))


class TestWriting:
    @pytest.mark.parametrize("leads_to", ["file", "nothing", "folder", "device"])
    def test_measures_are_not_written_through_a_link(self, run, tmp_path, leads_to, untouched):
        victim = Path("/dev/null") if leads_to == "device" else tmp_path / "victim"
        if leads_to == "file":
            victim.write_text("mine")
        elif leads_to == "folder":
            victim.mkdir()
        (run / "eval_last.json").symlink_to(victim)
        refused(evaluate.main, *evaluated(run))
        assert leads_to != "file" or victim.read_text() == "mine"
        assert leads_to != "nothing" or not victim.exists()
        untouched(1)

    def test_linked_checkpoints_do_not_lead_into_another_run(self, run, tmp_path, untouched):
        mine = tmp_path / "mine"
        shutil.copytree(run, mine)
        shutil.rmtree(run / "checkpoints")
        (run / "checkpoints").symlink_to(mine / "checkpoints")
        before = _files(mine)
        assert called(evaluate.main, *evaluated(run))[0] is None
        assert _files(mine) == before
        assert (run / "eval_last.json").is_file()
        untouched(1)

    @pytest.mark.parametrize(
        "word", ["http://127.0.0.1:1/x/y.ckpt", "s3://a/b.ckpt", "simplecache::file://x/y.ckpt"]
    )
    def test_address_is_refused(self, run, word, untouched):
        Path(word).parent.mkdir(parents=True)
        shutil.copy(run / "config.yaml", Path(word).parent.parent)
        shutil.copy(run / "checkpoints" / "last.ckpt", word)
        assert "URL" in refused(evaluate.main, f"ckpt_path={word}")
        refused(inspect, word)
        untouched(2)

    def test_folder_that_looks_like_an_address_is_a_folder(self, run):
        shutil.copytree(run, "http:/run")
        assert called(evaluate.main, "ckpt_path=http:/run/checkpoints/last.ckpt")[0] is None
        assert Path("http:/run/eval_last.json").is_file()


BOMB = "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 12))


class TestGreedyFiles:
    @pytest.mark.parametrize(
        "text",
        [
            "a0: &a0 lol\n" + BOMB,
            "[" * 20_000,
            "a: {" * 5_000,
            "x: " + "9" * 5_000,
            "!!python/name:os.system a",
            "\0",
        ],
    )
    def test_greedy_yaml_is_refused(self, run, text, untouched):
        (run / "config.yaml").write_text(text)
        refused(evaluate.main, *evaluated(run))
        refused(inspect, f"{run}/checkpoints/last.ckpt")
        refused(report, str(run), "--out", "page.html")
        untouched(3)

    @pytest.mark.parametrize(
        "name", ["config.yaml", "summary.json", "environment.json", "csv/metrics.csv", "last"]
    )
    def test_pipe_is_refused(self, run, name, untouched):
        path = run / ("checkpoints/last.ckpt" if name == "last" else name)
        path.unlink()
        os.mkfifo(path)
        if name in ("config.yaml", "last"):
            refused(evaluate.main, *evaluated(run))
            refused(inspect, f"{run}/checkpoints/last.ckpt")
        if name != "last":
            refused(report, str(run), "--out", "page.html")
        untouched(1)

    @pytest.mark.parametrize("name", ["config.yaml", "summary.json"])
    @pytest.mark.parametrize("kind", ["device", "sparse", "folder"])
    def test_endless_file_is_refused(self, run, name, kind, untouched):
        path = run / name
        path.unlink()
        if kind == "device":
            path.symlink_to("/dev/zero")
        elif kind == "folder":
            path.mkdir()
        else:
            with path.open("wb") as file:
                file.truncate(2**40)
        refused(report, str(run), "--out", "page.html")
        if name == "config.yaml":
            refused(evaluate.main, *evaluated(run))
        untouched(1)


ESCAPES = (
    "\x1b[31mred",
    "\x1b]0;title\x07",
    "\r\x1b[2Kgone",
    "\x9b2J",
    "\u202egpj.exe",
    "a[/b]",
    "[bold]a[/x]",
    ":smile:",
)


class TestTerminal:
    @pytest.mark.parametrize("name", [each for each in ESCAPES if "/" not in each])
    def test_run_of_any_name_is_printed_as_it_is(self, run, name, untouched):
        received = run.rename(run.parent / name)
        for main, words in (
            (evaluate.main, evaluated(received)),
            (inspect, (f"{received}/checkpoints/last.ckpt",)),
            (report, (str(received), "--out", f"{name}.html")),
        ):
            self.assert_plain(called(main, *words)[1])
        untouched(3)

    @pytest.mark.parametrize("value", ESCAPES)
    def test_value_of_any_text_is_printed_as_it_is(self, run, value, untouched):
        change(run, "trainer.accelerator", value)
        self.assert_plain(refused(evaluate.main, *evaluated(run)))
        change(run, value.replace(".", ""), {"_target_": value})
        self.assert_plain(refused(evaluate.main, *evaluated(run)))
        untouched(2)

    @pytest.mark.parametrize("value", ESCAPES)
    def test_sweep_of_any_name_is_shown(self, run, value, untouched):
        from rich.console import Console

        from moe_plugin.apps.report.sweep import sweep_table

        job = run / "sweep" / value.replace("/", "")
        (job / ".hydra").mkdir(parents=True)
        shutil.copy(run / "summary.json", job)
        (job / ".hydra" / "overrides.yaml").write_text(yaml.safe_dump([f"name={value}", f"{value}=1"]))
        (run / "sweep" / "other").mkdir()
        (run / "sweep" / "other" / "stopped.txt").write_text(f"{value}: failed")
        text = io.StringIO()
        Console(file=text, width=200).print(sweep_table(run / "sweep"))
        self.assert_plain(text.getvalue())
        assert value.replace("/", "") in text.getvalue() or not value.isprintable()
        untouched(1)

    def assert_plain(self, text: str) -> None:
        assert all(c.isprintable() or c == "\n" for c in text), text


def test_no_canary_of_all_is_touched(count, figure):
    """The last test of the file: it adds up the others."""
    number = count["untouched"]
    figure(f"received files: {number} of {number} canaries untouched")
