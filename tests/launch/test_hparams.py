from __future__ import annotations

import math

from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

from moe_plugin.launch.compose import compose_jobs
from moe_plugin.launch.hparams import METRICS, log_hyperparameters


def test_settings_and_measures_reach_the_hparams_tab(tmp_path):
    (config,) = compose_jobs(["seed=7"], multirun=False)
    logger = TensorBoardLogger(tmp_path, name="", version="")
    log_hyperparameters([logger, CSVLogger(tmp_path)], config)
    logger.save()
    read = EventAccumulator(str(tmp_path)).Reload()
    content = {
        kind: HParamsPluginData.FromString(content)
        for kind, content in read.PluginTagToContent("hparams").items()
    }
    settings = content["_hparams_/session_start_info"].session_start_info.hparams
    assert settings["seed"].number_value == 7
    assert settings["model.dim"].number_value == 128
    assert not any(key.startswith("paths") for key in settings)
    assert {info.name.tag for info in content["_hparams_/experiment"].experiment.metric_infos} == set(METRICS)
    assert all(math.isnan(read.Scalars(tag)[0].value) for tag in METRICS)
