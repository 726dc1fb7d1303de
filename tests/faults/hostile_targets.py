"""What a received configuration could name so that something happens: each node leaves a canary when it is made."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def singing(canary: Path, scratch: Path) -> dict[str, dict[str, Any]]:
    """Returns the arguments by target with which each creates the canary."""
    path, script, source = str(canary), scratch / "script.py", scratch / "source.txt"
    script.write_text(f"import os\nos.mkdir({path!r})\n")
    source.write_text("canary")
    made = {"name": path}
    touch = {"args": ["touch", path]}
    copied = {"src": str(source), "dst": path}
    written = {"filename": path}
    return {
        "builtins.open": {"file": path, "mode": "w"},
        "io.open": {"file": path, "mode": "w"},
        "codecs.open": {"filename": path, "mode": "w"},
        "gzip.open": {"filename": path, "mode": "w"},
        "bz2.open": {"filename": path, "mode": "w"},
        "lzma.open": {"filename": path, "mode": "w"},
        "zipfile.ZipFile": {"file": path, "mode": "w"},
        "tarfile.open": {"name": path, "mode": "w"},
        "sqlite3.connect": {"database": path},
        "os.symlink": copied,
        "os.link": copied,
        "os.mkdir": {"path": path},
        "os.makedirs": made,
        "os.mkfifo": {"path": path},
        "os.mknod": {"path": path},
        "os.system": {"command": f"touch {path}"},
        "posix.system": {"command": f"touch {path}"},
        "subprocess.Popen": touch,
        "subprocess.run": touch,
        "subprocess.call": touch,
        "subprocess.check_call": touch,
        "subprocess.check_output": touch,
        "subprocess.getoutput": {"cmd": f"touch {path}"},
        "subprocess.getstatusoutput": {"cmd": f"touch {path}"},
        "shutil.copyfile": copied,
        "shutil.copy": copied,
        "shutil.copy2": copied,
        "shutil.copytree": {"src": str(scratch), "dst": path},
        "logging.FileHandler": written,
        "logging.handlers.RotatingFileHandler": written,
        "logging.handlers.TimedRotatingFileHandler": written,
        "logging.handlers.WatchedFileHandler": written,
        "runpy.run_path": {"path_name": str(script)},
        "builtins.exec": {"_args_": [script.read_text()]},
        "builtins.eval": {"_args_": [f"__import__('os').mkdir({path!r})"]},
        "numpy.memmap": {"filename": path, "mode": "w+", "shape": [1]},
        "numpy.savetxt": {"fname": path, "X": [1]},
        "torch.save": {"obj": 1, "f": path},
        "hydra.utils.call": {"config": {"_target_": "os.mkdir", "path": path}},
        "hydra.utils.instantiate": {"config": {"_target_": "os.mkdir", "path": path}},
        "omegaconf.OmegaConf.save": {"config": {}, "f": path},
        "lightning.pytorch.core.saving.save_hparams_to_yaml": {"config_yaml": path, "hparams": {"a": 1}},
        "lightning.pytorch.loggers.csv_logs.os.mkdir": {"path": path},
        "lightning.pytorch.callbacks.model_checkpoint.shutil.copyfile": copied,
        "moe_plugin.apps.study.child_run.subprocess.call": touch,
        "moe_plugin.apps.inspection.inspect_source.torch.save": {"obj": 1, "f": path},
        "moe_plugin.routing.router.torch.save": {"obj": 1, "f": path},
        "moe_plugin.apps.study.child_run.os.makedirs": made,
    }


SILENT = (
    *("os.popen", "os.remove", "os.kill", "os._exit", "os.execv", "os.rename", "os.chmod", "os.putenv"),
    *("sys.exit", "sys.setrecursionlimit", "builtins.__import__", "builtins.compile", "builtins.setattr"),
    *("shutil.move", "shutil.rmtree", "shutil.make_archive", "shutil.unpack_archive", "logging.basicConfig"),
    *("tempfile.mkdtemp", "tempfile.mkstemp", "shelve.open", "dbm.dumb.open", "pty.spawn", "venv.create"),
    *("urllib.request.urlopen", "urllib.request.urlretrieve", "http.client.HTTPConnection", "smtplib.SMTP"),
    *("socket.create_connection", "ftplib.FTP", "webbrowser.open", "xmlrpc.client.ServerProxy"),
    *("requests.get", "fsspec.open", "fsspec.core.url_to_fs", "aiohttp.ClientSession", "pip._internal.main"),
    *(
        "importlib.import_module",
        "importlib.reload",
        "pkgutil.resolve_name",
        "pydoc.locate",
        "runpy.run_module",
    ),
    *("pickle.load", "pickle.loads", "marshal.loads", "yaml.unsafe_load", "yaml.full_load", "numpy.load"),
    *("torch.load", "torch.hub.load", "torch.hub.load_state_dict_from_url", "torch.hub.download_url_to_file"),
    *(
        "torch.distributed.run.main",
        "torch.utils.cpp_extension.load",
        "torch.jit.load",
        "torch.ops.load_library",
    ),
    *("torch.distributed.init_process_group", "torch.compile", "torch.set_default_device", "torch.optim.os"),
    *(
        "functools.partial",
        "functools.reduce",
        "operator.methodcaller",
        "operator.attrgetter",
        "types.FunctionType",
    ),
    *("threading.Thread", "threading.Timer", "multiprocessing.Process", "atexit.register", "signal.signal"),
    *(
        "ctypes.CDLL",
        "code.interact",
        "asyncio.run",
        "pdb.run",
        "timeit.timeit",
        "cProfile.run",
        "trace.main",
    ),
    *(
        "hydra.utils.get_class",
        "hydra.utils.get_method",
        "hydra.utils.get_object",
        "hydra.main",
        "hydra.compose",
    ),
    *(
        "hydra._internal.utils._locate",
        "omegaconf.OmegaConf.load",
        "omegaconf.OmegaConf.register_new_resolver",
    ),
    *(
        "transformers.AutoModel.from_pretrained",
        "transformers.AutoTokenizer.from_pretrained",
        "transformers.pipeline",
    ),
    *(
        "transformers.Trainer",
        "transformers.AutoConfig.from_pretrained",
        "datasets.load_dataset",
        "jinja2.Template",
    ),
    *(
        "lightning.pytorch.cli.LightningCLI",
        "lightning.fabric.utilities.cloud_io._load",
        "lightning.pytorch.Trainer.fit",
    ),
    *(
        "lightning.pytorch.callbacks.os",
        "lightning.pytorch.loggers.wandb.os.system",
        "lightning.pytorch.LightningModule",
    ),
    *("lightning.pytorch.strategies.launchers.subprocess_script.subprocess.Popen", "lightning.Trainer"),
    *("moe_plugin.apps.train.main", "moe_plugin.apps.launch.run_folder.prepare_", "moe_plugin.balance_"),
    *("moe_plugin.apps.report.atomic_write.write_atomically", "moe_plugin.checkpoints.safe_load.load_file"),
    *("moe_plugin.apps.data.cache.load_or_build", "moe_plugin.routing.Sigmoid.__init__", "moe_plugin"),
    *(
        "moe_plugin.routing.Sigmoid ",
        "moe_plugin.routing.Sigm\N{CYRILLIC SMALL LETTER O}id",
        ".os.system",
        "os.",
        "",
        "my.Model",
    ),
)
"""Targets that would end the test, need a network, or only help others."""

MISPLACED = {
    "model.router.score": ("lightning.pytorch.loggers.WandbLogger", "lightning.pytorch.Trainer"),
    "data.source": ("lightning.pytorch.callbacks.ModelCheckpoint", "torch.optim.SGD"),
    "callbacks.loss_free.rule": (
        "lightning.pytorch.loggers.CSVLogger",
        "lightning.pytorch.profilers.SimpleProfiler",
    ),
    "logger.csv": ("lightning.pytorch.strategies.DDPStrategy", "lightning.pytorch.callbacks.LambdaCallback"),
}
"""Classes that are allowed elsewhere: made in the wrong place they could get settings that are not looked at there."""
