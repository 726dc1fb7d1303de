"""Run a module once on tensors without data to see how it routes, and restore it.

Shape legend: T tokens, D model width.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.tensor import DTensor
from torch.overrides import TorchFunctionMode

from moe_plugin.attach.discovery.probing.input_guesses import Input, others
from moe_plugin.attach.discovery.probing.ranking import Ranking
from moe_plugin.attach.discovery.probing.trace import Trace

MAX_QUESTIONS = 100
# What a forward may raise when called with inputs that are not its own.
_WRONG_CALL = (
    *(TypeError, ValueError, AttributeError, RuntimeError, LookupError, NotImplementedError, AssertionError),
    *(ArithmeticError, ImportError, UnboundLocalError),
)


class Seen(NamedTuple):
    """What a probe saw in the module: its rankings, and the followed tensors on which its output depends.

    ``returned`` is None if the forward did not finish; ``used`` are those used after the last ranking. ``unsteerable``
    are calls that may select without ranking: their names, and what they select from.
    """

    rankings: list[Ranking]
    returned: set[str] | None
    used: set[str]
    unsteerable: list[tuple[str, Tensor]]


class _Done(BaseException):
    """Ends a probe once the module of interest has returned."""


class _Answers(TorchFunctionMode):
    """Answers questions about data, which fake tensors do not have, so the code continues."""

    def __init__(self, answer: bool) -> None:
        super().__init__()
        self.answer = answer
        self.asked = 0

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func is not Tensor.__bool__:
            return func(*args, **(kwargs or {}))
        self.asked += 1
        if self.asked > MAX_QUESTIONS:
            raise RuntimeError("a loop that only data would end")
        return self.answer


def probes(
    module: nn.Module, hosts: Sequence[nn.Module], inputs: Iterable[Input], followed: Mapping[str, Tensor]
) -> Iterator[Seen]:
    """See how ``module`` ranks, by running hosts on all kinds of inputs.

    Everything runs on fake tensors: no memory, no arithmetic, no random numbers, and no change to the modules. Compiled
    modules run eagerly.

    Args:
        module: The module of interest.
        hosts: Modules to call, ``module`` itself or one that holds it, in order of preference.
        inputs: Guesses of the first argument.
        followed: Tensors to follow, by name.

    Yields:
        What was seen in each run that reached a selection in the module, or its end.
    """
    inputs = list(inputs)
    for host in hosts:
        for make in inputs:
            seen = _run(module, host, make, followed)
            if seen is not None:
                yield seen


def _run(module: nn.Module, host: nn.Module, make: Input, followed: Mapping[str, Tensor]) -> Seen | None:
    eager = torch.compiler.set_stance("force_eager")  # under fake tensors compiled code crashes
    with eager, _unchanged(host), _quiet(), FakeTensorMode(allow_non_fake_inputs=True):
        _clear_hooks_(host)
        whole = _make_whole_(host)
        followed = {name: whole.get(id(tensor), tensor) for name, tensor in followed.items()}
        x = make()
        for rest in others(host, x):
            for answers in (_Answers(False), _Answers(True)):
                seen = _watch(module, host, (x, *rest), answers, followed)
                if seen is not None:
                    return seen
                if not answers.asked:
                    break
    return None


def _watch(
    module: nn.Module, host: nn.Module, args: tuple, answers: _Answers, followed: Mapping[str, Tensor]
) -> Seen | None:
    """Call ``host`` and return what ``module`` did; None if it neither selected nor returned."""
    trace, seen, entered = Trace(followed), [], False

    def enter(*_: Any) -> None:
        nonlocal entered
        entered = True
        trace.clear_()

    def leave(_module: nn.Module, _args: Any, output: Any) -> None:
        trace.note_returned_(output)
        seen.append(trace.marks_of(output))
        raise _Done

    handles = module.register_forward_pre_hook(enter), module.register_forward_hook(leave)
    try:
        with trace, answers, torch.random.fork_rng(devices=[]):
            host(*args)
    except _Done:
        return Seen(trace.rankings, seen[0], trace.used, trace.unsteerable)
    except _WRONG_CALL:
        if entered and (trace.rankings or trace.unsteerable):
            return Seen(trace.rankings, None, trace.used, trace.unsteerable)
    finally:
        for handle in handles:
            handle.remove()
    return None


def _clear_hooks_(root: nn.Module) -> None:
    """Remove the hooks of all modules: they belong to real forwards. FSDP's would set up sharding permanently."""
    for module in root.modules():
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            hooks.clear()


def _make_whole_(root: nn.Module) -> dict[int, Tensor]:
    """Replace sharded parameters, which do not mix with fake inputs, by fake tensors of full size.

    Returns:
        The new parameters, by the ``id`` of those that they replace.
    """
    whole: dict[int, Tensor] = {}
    for module in root.modules():
        for name, parameter in module._parameters.items():
            if isinstance(parameter, DTensor):
                full = torch.empty(parameter.shape, dtype=parameter.dtype, device=parameter.device)
                made = nn.Parameter(full, requires_grad=parameter.requires_grad)
                whole[id(parameter)] = module._parameters[name] = made
    return whole


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep torch from logging the errors that wrong guesses raise, and from warning about them."""
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    before, logger.disabled = logger.disabled, True
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.disabled = before


@contextmanager
def _unchanged(root: nn.Module) -> Iterator[None]:
    """Restore every attribute and every container of the modules afterwards."""
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
