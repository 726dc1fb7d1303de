"""What balancing costs: an attached router, the update of all biases, and a fit with and without callbacks.

Routers are transformers', at the sizes of Qwen3-MoE and DeepSeek-V3. Shape legend: T tokens, D model width.
"""

from __future__ import annotations

import copy
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader

from benchmarks.gpu.line import Figures, Line
from benchmarks.gpu.place import Place
from benchmarks.gpu.timing import extra_microseconds, microseconds_per_call
from benchmarks.gpu.waits import Waits, counted_waits, waits_of
from benchmarks.models import random_tokens, small_model
from moe_plugin import LoadMonitor, LossFreeBalancing, balance_
from moe_plugin.experts import ExpertShape

TOKENS = 4096
LAYERS, EXPERTS = 60, 256
NEAR_TIES = 0.01
"""Share of tokens whose experts may depend on how a compiler orders a sum."""
CALLBACKS: dict[str, Callable[[], list[Callback]]] = {
    "no callback": list,
    "LossFreeBalancing": lambda: [LossFreeBalancing()],
    "LossFreeBalancing and LoadMonitor": lambda: [LossFreeBalancing(), LoadMonitor()],
}


def lines(place: Place) -> Iterator[Line]:
    """Yield each router in each mode, the update, and fits."""
    for host in HOSTS:
        for mode in ("eager", "compiled"):
            yield Line(f"{host}, {mode}", partial(attached, place, host, mode), ("transformers",))
    yield Line(f"update, {LAYERS} layers x {EXPERTS} experts", partial(update, place))
    for callbacks in CALLBACKS:
        yield Line(f"fit of small, {callbacks}", partial(fitted, place, callbacks))


def qwen3(place: Place) -> tuple[nn.Module, int]:
    """Return a block with the router of Qwen3-30B-A3B and narrow experts, and its width."""
    from benchmarks.qwen3 import qwen3_block

    dim, experts, top_k = place.size((2048, 128, 8), (32, 8, 2))
    return qwen3_block(dim, experts, top_k, 16, "grouped_mm"), dim


def deepseek_v3(place: Place) -> tuple[nn.Module, int]:
    """Return a block with the router of DeepSeek-V3 and narrow experts, and its width."""
    from transformers import DeepseekV3Config
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3MoE

    dim, experts, top_k, groups, open_groups = place.size((7168, 256, 8, 8, 4), (32, 8, 2, 4, 2))
    config = DeepseekV3Config(
        hidden_size=dim,
        n_routed_experts=experts,
        num_experts_per_tok=top_k,
        n_group=groups,
        topk_group=open_groups,
        moe_intermediate_size=16,
        n_shared_experts=1,
    )
    config._experts_implementation = "grouped_mm"
    block = DeepseekV3MoE(config)
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
    return block, dim


HOSTS = {"Qwen3-MoE": qwen3, "DeepSeek-V3": deepseek_v3}


def attached(place: Place, host: str, mode: str) -> Figures:
    """Measure a router with and without balancing, which must select the same experts.

    Args:
        place: Where.
        host: Whose router.
        mode: Eager or compiled.

    Raises:
        RuntimeError: They select differently while all biases are zero.
    """
    torch.manual_seed(0)
    with place.device:
        plain_block, dim = HOSTS[host](place)
        plain_block.bfloat16()
        x_1TD = torch.randn(1, place.size(TOKENS, 16), dim, dtype=torch.bfloat16)
    block = copy.deepcopy(plain_block)
    (name, site), *_ = balance_(block).items()
    plain, router = plain_block.get_submodule(name), block.get_submodule(name)
    router(x_1TD)  # tries and proves
    if mode == "compiled":
        plain, router = (torch.compile(each) for each in (plain, router))
    site.counters.looks_closely = False  # as in 15 steps of 16
    if (share := differing(plain(x_1TD), router(x_1TD))) > NEAR_TIES:
        raise RuntimeError(f"a bias of zero must change nothing, got {share:.2%} other tokens")
    microseconds, extra = extra_microseconds(place, lambda: router(x_1TD), lambda: plain(x_1TD))
    waits = waits_of(place, lambda: router(x_1TD))
    return {"us": microseconds, "us more": extra, "waits": waits}


def differing(one: Sequence[Tensor], other: Sequence[Tensor]) -> float:
    """Return the share of tokens for which two routers gave other numbers, in whatever order of the experts.

    Args:
        one: What a router gave, a row for each token.
        other: The same of the other router.
    """
    pairs = [tuple(each.float().sort(-1).values for each in pair) for pair in zip(one, other, strict=True)]
    wrong_T = torch.stack([~torch.isclose(*pair, rtol=1e-2, atol=1e-3).all(-1) for pair in pairs]).any(0)
    return float(wrong_T.float().mean())


def update(place: Place) -> Figures:
    """Measure the update of all biases of a deep model, whose sites have counted a batch each time."""
    layers, experts = place.size((LAYERS, EXPERTS), (3, 16))
    with place.device:
        shape = ExpertShape(num_experts=experts, top_k=8, hidden_dim=16)
        model = small_model(dim=64, num_layers=layers, num_heads=2, num_dense=0, experts=shape)
        tokens_BS = random_tokens(2)[:, :-1]
    balanced = balance_(model)
    microseconds: list[float] = []
    for _ in range(place.size(20, 2)):
        model(tokens_BS)
        microseconds.append(microseconds_per_call(place, balanced.update, calls=1))
    model(tokens_BS)
    waits = waits_of(place, balanced.update)
    return {"us": sorted(microseconds)[len(microseconds) // 2], "waits": waits}


class Clock(Callback):
    """Counts the waits of steps, then times steps; a step ends where the next one begins. The first callback.

    Attributes:
        waits: Those of each step between the first that logs and the second, which is the last of them.
        seconds: Wall time of all later steps.
        steps: How many.
    """

    def __init__(self, place: Place, log_every: int) -> None:
        """Begin at zero, in a fit that logs every so many steps."""
        self.waits: list[Waits] = []
        self.seconds, self.steps = 0.0, 0
        self._place, self._log_every, self._counting, self._begin = place, log_every, ExitStack(), 0.0

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """End a step and begin the next."""
        self._counting.close()
        if self._log_every <= batch_idx < 2 * self._log_every:
            self.waits.append(self._counting.enter_context(counted_waits(self._place)))
        if batch_idx == 2 * self._log_every:
            self._place.wait()
            self._begin = time.perf_counter()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop."""
        self._place.wait()
        self.seconds = time.perf_counter() - self._begin
        self.steps = trainer.global_step - 2 * self._log_every


def fitted(place: Place, callbacks: str) -> Figures:
    """Measure a step of Lightning's loop.

    Args:
        place: Where.
        callbacks: Which, by their key in `CALLBACKS`.
    """
    batch, log_every = place.size(32, 2), place.size(25, 4)
    steps, clock = place.size(8, 3) * log_every, Clock(place, log_every)
    model = small_model(**place.size({}, {"dim": 16, "num_layers": 2, "num_heads": 2}))
    batches: Any = [{"tokens": row} for row in random_tokens(steps * batch)]
    with tempfile.TemporaryDirectory() as folder:
        Trainer(
            max_steps=steps,
            accelerator=place.size("gpu", "cpu"),
            devices=1,
            precision="bf16-mixed",
            log_every_n_steps=log_every,
            gradient_clip_val=1.0,
            callbacks=[clock, *CALLBACKS[callbacks]()],
            logger=TensorBoardLogger(folder),
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        ).fit(model, DataLoader(batches, batch_size=batch))
    *between, logged = (each.count for each in clock.waits)
    return {
        "ms": 1e3 * clock.seconds / clock.steps,
        "waits": sum(between),
        "waits of a logged step": logged,
    }
