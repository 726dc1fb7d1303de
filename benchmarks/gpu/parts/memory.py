"""What `moe-plan` says a step of the model with a billion parameters takes, and what it takes.

Shape legend: B batch, S sequence.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch

from benchmarks.gpu.line import Figures, Line
from benchmarks.gpu.memory import peak_mib
from benchmarks.gpu.parts.step import MODELS, model_of
from benchmarks.gpu.place import Place
from moe_plugin.apps.models import AdamWWarmupCosine, LanguageModel
from moe_plugin.apps.plan.choices import Precision
from moe_plugin.apps.plan.cluster import Cluster, Hardware
from moe_plugin.apps.plan.meta_model import prepare_
from moe_plugin.apps.plan.scale_plan import make_plan
from moe_plugin.apps.plan.trace import next_token_loss
from moe_plugin.apps.plan.workload import Workload

MODEL = "1B"
PRECISIONS: tuple[Precision, ...] = ("bf16-mixed", "bf16-true", "32-true")
ONE_DEVICE = Cluster(Hardware("this device", 1, 139.8, 0.0, 989.0, 450.0, 50.0), nodes=1)


def lines(place: Place) -> Iterator[Line]:
    """Yield each precision."""
    for precision in PRECISIONS:
        yield Line(f"{MODEL}, {precision}", partial(planned_and_real, place, precision))


def planned_and_real(place: Place, precision: Precision) -> Figures:
    """Return both, and what the plan is of the real peak.

    Args:
        place: Where.
        precision: Lightning's name of it.
    """
    planned, real = planned_mib(place, precision), real_mib(place, precision)
    figures = {"planned MiB": planned, "real MiB": real, "planned / real": planned / real}
    if not place.dry:
        figures["reserved MiB"] = torch.cuda.max_memory_reserved() / 2**20
    return figures


def planned_mib(place: Place, precision: Precision) -> float:
    """Return the memory that the plan gives a device that trains alone.

    Args:
        place: Where.
        precision: Lightning's name of it.
    """

    def build() -> LanguageModel:
        with torch.device("meta"):
            model = model_of(place, MODEL)
        prepare_(model, precision, activation_checkpointing=False)
        return model

    sequences = place.size(MODELS[MODEL].sequences, 2)
    work = Workload(build, sequences, build().context_length, precision, activation_checkpointing=False)
    return make_plan(work, ONE_DEVICE, ["ddp"], []).layouts["ddp"].memory.total / 2**20


def real_mib(place: Place, precision: Precision) -> float:
    """Return what the device holds at most in the second step, when the optimizer has its states.

    Args:
        place: Where.
        precision: Lightning's name of it.
    """
    with place.device:
        model = model_of(place, MODEL)
        if precision == "bf16-true":
            model.bfloat16()
        size = place.size(MODELS[MODEL].sequences, 2), model.context_length
        tokens_BS = torch.randint(0, model.network.embedding.num_embeddings, size)
    optimizer = AdamWWarmupCosine().optimizer(model.parameters(), fused=True)

    def step() -> None:
        with torch.autocast(place.device.type, torch.bfloat16, enabled=precision == "bf16-mixed"):
            loss = next_token_loss(model, tokens_BS)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    states = [each for state in optimizer.state.values() for each in state.values()]
    held = sum(each.numel() * each.element_size() for each in [*model.parameters(), *states])
    return held / 2**20 + peak_mib(place, step)
