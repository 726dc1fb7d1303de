"""Images to every Lightning logger that takes them: TensorBoard, Weights & Biases, MLflow.

Shape legend: H, W pixels.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from lightning.pytorch.loggers import Logger


def log_image(loggers: Iterable[Logger], tag: str, image_3HW: np.ndarray, step: int) -> None:
    """Write an image to each logger that takes images.

    Args:
        loggers: The trainer's loggers.
        tag: The image's name.
        image_3HW: uint8, RGB.
        step: Where on the x-axis it belongs.
    """
    for logger in loggers:
        experiment = getattr(logger, "experiment", None)
        if hasattr(experiment, "add_image"):
            experiment.add_image(tag, image_3HW, global_step=step, dataformats="CHW")  # pyright: ignore
        elif hasattr(logger, "log_image"):
            logger.log_image(tag, [image_3HW.transpose(1, 2, 0)], step=step)  # pyright: ignore
        elif hasattr(experiment, "log_image") and hasattr(logger, "run_id"):
            experiment.log_image(logger.run_id, image_3HW.transpose(1, 2, 0), key=tag, step=step)  # pyright: ignore
