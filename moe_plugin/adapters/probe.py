"""Run a module once on tensors without data, to see how it routes, and leave no trace in it.

Shape legend: T tokens, D model width.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from moe_plugin.adapters.trace import Ranking, Trace

NUM_TOKENS = 97
"""A number that no model has as one of its sizes."""
# What a forward may raise when called with inputs that are not its own.
_WRONG_CALL = (
    *(TypeError, ValueError, AttributeError, RuntimeError, LookupError, NotImplementedError, AssertionError),
    *(ArithmeticError, ImportError, UnboundLocalError),
)


class Seen(NamedTuple):
    """What a probe saw in the module: its rankings, and the followed tensors on which its output depends.

    ``returned`` is None if the forward did not come to its end; ``used`` are those that went on after the last ranking.
    """

    rankings: list[Ranking]
    returned: set[str] | None
    used: set[str]


class _Done(BaseException):
    """Ends a probe once the module of interest has returned."""


def probes(
    module: nn.Module, hosts: Sequence[nn.Module], widths: Sequence[int], followed: Mapping[str, Tensor]
) -> Iterator[Seen]:
    """See how ``module`` ranks, by running hosts on hidden states alone: flat ones and a batch, of every width.

    Everything runs on fake tensors: no memory, no arithmetic, no random numbers, and no change to the modules.

    Args:
        module: The module of interest.
        hosts: Modules to call, ``module`` itself or one that holds it, in order of preference.
        widths: Guesses of D.
        followed: Tensors to follow, by name.

    Yields:
        What was seen in each run that came as far as a ranking in the module, or to its end.
    """
    dtype = next((p.dtype for p in module.parameters() if p.is_floating_point()), torch.float32)
    device = next((p.device for p in module.parameters()), torch.device("cpu"))
    for host in hosts:
        for width in widths:
            for shape in ((1, NUM_TOKENS, width), (NUM_TOKENS, width)):
                seen = _run(module, host, shape, dtype, device, followed)
                if seen is not None:
                    yield seen


def _run(
    module: nn.Module,
    host: nn.Module,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    device: torch.device,
    followed: Mapping[str, Tensor],
) -> Seen | None:
    trace, seen = Trace(followed), []

    def enter(*_: Any) -> None:
        trace.clear_()

    def leave(_module: nn.Module, _args: Any, output: Any) -> None:
        seen.append(Seen(trace.rankings, trace.marks_of(output), trace.used))
        raise _Done

    with _unchanged(host), _quiet(), FakeTensorMode(allow_non_fake_inputs=True):
        _clear_hooks_(host)
        module.register_forward_pre_hook(enter)
        module.register_forward_hook(leave)
        x = torch.zeros(shape, dtype=dtype, device=device)
        try:
            with trace, torch.random.fork_rng(devices=[]):
                host(x, *[None] * _missing(host))
        except _Done:
            return seen[0]
        except _WRONG_CALL:
            return Seen(trace.rankings, None, trace.used) if trace.rankings else None
    return None


def _clear_hooks_(root: nn.Module) -> None:
    """Take the hooks of all modules off: they belong to real forwards. FSDP's would set up its sharding for good."""
    for module in root.modules():
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            hooks.clear()


def _missing(host: nn.Module) -> int:
    """How many arguments without a default the forward has after its first."""
    parameters = list(inspect.signature(host.forward).parameters.values())[1:]
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return sum(p.default is p.empty and p.kind in kinds for p in parameters)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep torch from logging the errors that wrong guesses of the width raise."""
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    before, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = before


@contextmanager
def _unchanged(root: nn.Module) -> Iterator[None]:
    """Give every attribute and every container of the modules back as it was."""
    saved = [
        (module, {name: (value, _copy(value)) for name, value in vars(module).items()})
        for module in root.modules()
    ]
    try:
        yield
    finally:
        for module, attributes in saved:
            vars(module).clear()
            for name, (value, content) in attributes.items():
                vars(module)[name] = value
                _refill(value, content)


def _copy(value: Any) -> Any:
    return value.copy() if isinstance(value, (list, dict, set)) else None


def _refill(value: Any, content: Any) -> None:
    if isinstance(value, list):
        value[:] = content
    elif isinstance(value, (dict, set)):
        value.clear()
        value.update(content)
