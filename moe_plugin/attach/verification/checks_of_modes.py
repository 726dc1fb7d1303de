"""Check balancing in other ways to run a model: in bf16, in inference mode, with other parameters, compiled."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call as call_with
from torch.utils._pytree import tree_map

from moe_plugin.attach.verification.checks_of_counts import count_again
from moe_plugin.attach.verification.comparison import close, identical, require_alike, require_same_counts
from moe_plugin.attach.verification.result import require
from moe_plugin.attach.verification.subject import Outcome, Subject

BACKENDS = ("eager", "aot_eager")


def bf16(subject: Subject) -> str:
    """Check that a model in bf16 keeps its biases in fp32, and counts exactly."""
    balanced = subject.biased()
    before = {name: site.bias.clone() for name, site in balanced.sites.items()}
    _in_bf16(balanced.model)
    for name, site in balanced.sites.items():
        require(site.bias.dtype == torch.float32, f"{name}: the cast made the bias {site.bias.dtype}")
        require(torch.equal(site.bias, before[name]), f"{name}: the cast changed the bias")
    subject.skip_unless_plain(lambda model: subject.train(_in_bf16(model)), what="trained in bf16")
    count_again(subject, balanced)
    return ""


def inference_mode(subject: Subject) -> str:
    """Check that a pass in inference mode selects and counts as evaluation does, and that training can follow."""

    def infer_and_train(model: nn.Module) -> tuple[Outcome, Outcome]:
        with torch.inference_mode():
            inferred = subject.evaluate(model)
        return inferred, subject.train(model)

    subject.skip_unless_plain(infer_and_train, what="run in inference mode and trained")
    usual, other = subject.biased(), subject.biased()
    evaluated, trained = subject.evaluate(usual.model), subject.train(usual.model)
    inferred, trained_after = infer_and_train(other.model)
    require_alike(evaluated, inferred, identical, "in inference mode")
    require_alike(trained, trained_after, identical, "in training after inference mode")
    require_same_counts(usual.sites, other.sites, "in inference mode, and in training after it,")
    return ""


def functional_call(subject: Subject) -> str:
    """Check that `torch.func.functional_call` with the model's own parameters selects and counts as usual."""
    subject.skip_unless_plain(lambda model: subject.train(_Functional(model)), what="called functionally")
    usual, other = subject.biased(), subject.biased()
    expected = subject.train(usual.model)
    seen = subject.train(_Functional(other.model))
    require_alike(expected, seen._replace(gradients=expected.gradients), identical, "in functional_call")
    require_same_counts(usual.sites, other.sites, "in functional_call")
    return ""


def compile(subject: Subject) -> str:
    """Check that compiled code selects and counts as usual, also after the bias has moved."""
    for backend in BACKENDS:
        with _compiling():
            subject.skip_unless_plain(
                lambda model, b=backend: _train_compiled(subject, model, b), what="compiled"
            )
        with _compiling():
            _compiled_is_as_usual(subject, backend)
    return " and ".join(BACKENDS)


def _compiled_is_as_usual(subject: Subject, backend: str) -> None:
    usual, other = subject.biased(), subject.biased()
    other.model.compile(backend=backend)
    for when in (f"compiled by {backend}", f"compiled by {backend}, once the bias has moved,"):
        expected, seen = subject.train(usual.model), subject.train(other.model)
        require_same_counts(usual.sites, other.sites, when)
        require_alike(expected, seen, close, when)
        for sites in (usual.sites, other.sites):
            for name, site in sites.items():
                site.bias.add_(site.bias.roll(1) + subject.spreads[name])


def _train_compiled(subject: Subject, model: nn.Module, backend: str) -> None:
    model.compile(backend=backend)
    subject.train(model)


@contextmanager
def _compiling() -> Iterator[None]:
    """Forget compiled code before and after, and keep torch from warning about graph breaks."""
    torch._dynamo.reset()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        torch._dynamo.reset()


def _in_bf16(model: nn.Module) -> nn.Module:
    """Cast a model and whatever it is called with."""

    def cast(value: Any) -> Any:
        return value.bfloat16() if isinstance(value, Tensor) and value.is_floating_point() else value

    model.register_forward_pre_hook(lambda _, args, kwargs: tree_map(cast, (args, kwargs)), with_kwargs=True)
    return model.bfloat16()


class _Functional(nn.Module):
    """Calls a model with copies of its own parameters; everything else is the model's."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        parameters = {name: p.detach().clone().requires_grad_(p.requires_grad) for name, p in self._own()}
        return call_with(self.model, parameters, args, kwargs)

    def _own(self) -> Iterator[tuple[str, nn.Parameter]]:
        return self.model.named_parameters()

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("model"), name)
