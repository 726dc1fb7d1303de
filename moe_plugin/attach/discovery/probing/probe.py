"""Run a module once on tensors without data to see how it routes, and restore it.

Shape legend: T tokens, D model width.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import Any, NamedTuple
from weakref import ref

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributions import Distribution
from torch.overrides import TorchFunctionMode

from moe_plugin.attach.discovery.probing.example import Example, example_of
from moe_plugin.attach.discovery.probing.host_state import HostState
from moe_plugin.attach.discovery.probing.input_guesses import Input, others
from moe_plugin.attach.discovery.probing.leftovers import RecordingFakeMode, refuse_leftovers
from moe_plugin.attach.discovery.probing.ranking import Ranking
from moe_plugin.attach.discovery.probing.restored import same_random_numbers
from moe_plugin.attach.discovery.probing.trace import Trace, tensors_in

MAX_QUESTIONS = 100
WRONG_CALL = (
    *(TypeError, ValueError, AttributeError, RuntimeError, LookupError, NotImplementedError, AssertionError),
    *(ArithmeticError, ImportError, UnboundLocalError),
)
"""What a forward may raise when called with inputs that are not its own."""


class Seen(NamedTuple):
    """What a probe saw in the module: its rankings, and the followed tensors on which its output depends.

    ``returned`` is None if the forward did not finish; ``used`` are those used after the last ranking. ``unsteerable``
    are calls that may select without ranking: their names, and what they select from. ``num_entries`` is the size of
    the module's first tensor, ``example`` what it was called with. ``again`` is the same with twice the tokens, in the
    other mode: training or evaluation.
    """

    rankings: list[Ranking]
    returned: set[str] | None
    used: set[str]
    unsteerable: list[tuple[str, Tensor]]
    num_entries: int
    example: Example | None = None
    again: Seen | None = None


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

    Everything runs on fake tensors: no memory, no arithmetic, and no change to the modules or to what their code
    reaches. Compiled modules run eagerly.

    Args:
        module: The module of interest.
        hosts: Modules to call, ``module`` itself or one that holds it, in order of preference.
        inputs: Guesses of the first argument.
        followed: Tensors to follow, by name.

    Yields:
        What was seen in each run that reached a selection in the module, or its end.

    Raises:
        AttachError: If the code of the module keeps tensors of the probe where they are not found.
    """
    inputs = list(inputs)
    alive: list[ref[Tensor]] = []
    for host in hosts:
        state = HostState(host)
        for make in inputs:
            mode = RecordingFakeMode()
            with _unchanged(host, state), _quiet(), _unvalidated():
                seen = _run(module, host, make, followed, mode)
            seen = seen and _without_data(seen)
            alive += mode.alive
            if seen is not None:
                refuse_leftovers(module, alive)
                yield seen
    refuse_leftovers(module, alive)


def _run(
    module: nn.Module, host: nn.Module, make: Input, followed: Mapping[str, Tensor], mode: RecordingFakeMode
) -> Seen | None:
    eager = torch.compiler.set_stance("force_eager")  # under fake tensors compiled code crashes
    with eager, mode:
        _clear_hooks_(host)
        whole = _make_whole_(host)
        followed = {name: whole.get(id(tensor), tensor) for name, tensor in followed.items()}
        x = make()
        for number, rest in enumerate(others(host, x)):
            for answers in (_Answers(False), _Answers(True)):
                seen = _watch(module, host, (x, *rest), answers, followed)
                if seen is not None:
                    for each in host.modules():
                        each.training = not each.training
                    twice = torch.cat([x, x])
                    more = next(islice(others(host, twice), number, None))
                    return seen._replace(
                        again=_watch(module, host, (twice, *more), _Answers(answers.answer), followed)
                    )
                if not answers.asked:
                    break
    return None


def _watch(
    module: nn.Module, host: nn.Module, args: tuple, answers: _Answers, followed: Mapping[str, Tensor]
) -> Seen | None:
    """Call ``host`` and return what ``module`` did; None if it neither selected nor returned."""
    trace, seen, entered = Trace(followed), [], list[tuple[int, Example | None]]()

    def enter(_module: nn.Module, given: tuple, named: dict[str, Any]) -> None:
        num_entries = next((tensor.numel() for tensor in tensors_in((given, named))), 0)
        entered[:] = [(num_entries, example_of(given, named))]
        trace.clear_()

    def leave(_module: nn.Module, _args: Any, output: Any) -> None:
        trace.note_returned_(output)
        seen.append(trace.marks_of(output))
        raise _Done

    handles = module.register_forward_pre_hook(enter, with_kwargs=True), module.register_forward_hook(leave)
    try:
        with trace, answers:
            host(*args)
    except _Done:
        return Seen(trace.rankings, seen[0], trace.used, trace.unsteerable, *entered[0])
    except WRONG_CALL:
        soft = any(not ranking.hard for ranking in trace.rankings)
        if entered and (soft or trace.unsteerable):
            return Seen(trace.rankings, None, trace.used, trace.unsteerable, *entered[0])
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
def _unchanged(root: nn.Module, state: HostState) -> Iterator[None]:
    """Restore the state and the random numbers afterwards."""
    with same_random_numbers(root):
        try:
            yield
        finally:
            state.restore_()


@contextmanager
def _unvalidated() -> Iterator[None]:
    """Keep distributions from checking their parameters, which needs data."""
    before = Distribution._validate_args
    Distribution.set_default_validate_args(False)
    try:
        yield
    finally:
        Distribution.set_default_validate_args(before)


def _without_data(seen: Seen) -> Seen:
    """Replace what was ranked by tensors on no device, equal ones by the same one, so no fake tensor is kept."""
    blank: dict[int, Tensor] = {}

    def blank_of(scores: Tensor) -> Tensor:
        return blank.setdefault(id(scores), torch.empty(scores.shape, dtype=scores.dtype, device="meta"))

    fakes = [
        (ranking.call.scores, ranking.ids) for ranking in seen.rankings
    ]  # their ids stay in use until the end
    for ranking, (scores, ids) in zip(seen.rankings, fakes, strict=True):
        ranking.call, ranking.ids = ranking.call._replace(scores=blank_of(scores)), blank_of(ids)
    unsteerable = [(name, blank_of(scores)) for name, scores in seen.unsteerable]
    return seen._replace(unsteerable=unsteerable, again=seen.again and _without_data(seen.again))
