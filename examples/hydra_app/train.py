"""A Hydra app of the shape of lightning-hydra-template: balancing is one word on its command line.

Run it: python examples/hydra_app/train.py "callbacks=[default,loss_free]"

The same with another rule, and as an experiment that has its line in the project's configuration:

    python examples/hydra_app/train.py +balancing=loss_free +rule=sign rule.rate=0.01
    python examples/hydra_app/train.py -m experiment=balanced seed=0,1
"""

from __future__ import annotations

import hydra
import lightning
from hydra.utils import instantiate
from omegaconf import DictConfig


def train(config: DictConfig) -> lightning.Trainer:
    """Train as configured; nothing here is about balancing."""
    lightning.seed_everything(config.seed, verbose=False)
    data, model = instantiate(config.data), instantiate(config.model)
    callbacks = [instantiate(each) for each in config.callbacks.values()]
    trainer: lightning.Trainer = instantiate(config.trainer, callbacks=callbacks)
    trainer.fit(model, datamodule=data)
    return trainer


@hydra.main(version_base="1.3", config_path="configs", config_name="train.yaml")
def main(config: DictConfig) -> float:
    """Return the last loss, which a sweep can minimise."""
    metrics = train(config).callback_metrics
    print({name: round(value.item(), 3) for name, value in metrics.items()})
    return metrics["train/loss"].item()


if __name__ == "__main__":
    main()
