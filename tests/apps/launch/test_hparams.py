from __future__ import annotations

from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

from moe_plugin.apps.launch.hparams import METRICS, log_hyperparameters


def test_given_settings_and_measures_reach_the_hparams_tab(tmp_path):
    (tmp_path / ".hydra").mkdir()
    given = [
        "seed=7",
        "router=top_p",
        'experts="8"',
        "trainer.max_steps=20",
        "name=x",
        "+trainer.precision=null",
        "callbacks.loss_free.sites=*router",
    ]
    (tmp_path / ".hydra" / "overrides.yaml").write_text("".join(f"- {word}\n" for word in given))
    logger = TensorBoardLogger(tmp_path, name="", version="")
    log_hyperparameters([logger, CSVLogger(tmp_path)], tmp_path, 7)
    logger.save()
    read = EventAccumulator(str(tmp_path)).Reload()
    content = {
        kind: HParamsPluginData.FromString(content)
        for kind, content in read.PluginTagToContent("hparams").items()
    }
    settings = content["_hparams_/session_start_info"].session_start_info.hparams
    sites = "callbacks.loss_free.sites"
    assert set(settings) == {"seed", "router", "experts", "trainer.max_steps", "trainer.precision", sites}
    assert settings[sites].string_value == "*router"
    assert settings["seed"].number_value == 7
    assert settings["router"].string_value == "top_p"
    assert settings["experts"].number_value == 8
    assert settings["trainer.precision"].string_value == "None"
    assert {info.name.tag for info in content["_hparams_/experiment"].experiment.metric_infos} == set(METRICS)
    assert read.Tags()["scalars"] == []
