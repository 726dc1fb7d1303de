"""Prove that the fused experts compute what a host's own forward does, before they replace it.

The host's code is run on two experts of its sizes, with random weights in fp64 on the CPU. So the model may be on the
meta device, sharded or in bf16, its weights may be zero, and rounding hides no difference.

Shape legend: T tokens, D model width, E experts, K experts selected per token.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from moe_plugin.attach.fused.host_forward import FusedHostExperts, Fusion
from moe_plugin.attach.fused.projections import Projections

_TOKENS, _EXPERTS = 8, 2
_SCALES = (1.0, 1e6)
"""Of the activations: the first shows another activation function, the second a limit on activations."""
_TOLERANCE = 1e-5
"""Largest difference over largest value; hosts may compute in fp32 internally."""
_FAILURES = (RuntimeError, TypeError, ValueError, AttributeError, LookupError, AssertionError, ImportError)


def disagreement(experts: nn.Module, projections: Projections) -> str:
    """Return why the fused experts would not give what this layer gives, outputs and gradients; '' if they do.

    Args:
        experts: The layer.
        projections: How it holds its projections.
    """
    generator = torch.Generator().manual_seed(0)
    modes = torch.inference_mode(False), torch.enable_grad(), torch.autocast("cpu", enabled=False)
    with torch.random.fork_rng([]), modes[0], modes[1], modes[2]:
        sample = _sample(experts, projections, generator)
        for scale in _SCALES:
            inputs = _inputs(sample, projections, scale, generator)
            try:
                theirs = _results(type(experts), sample, inputs)
            except _FAILURES as error:
                return f"its forward cannot be run on random experts in fp64 on the CPU: {error!r}"
            ours = _results(FusedHostExperts, sample, inputs)
            for what, one, other in zip(("output", "gradient", "gradient"), theirs, ours, strict=True):
                error = _relative_error(one, other)
                if not error <= _TOLERANCE:
                    return (
                        f"it computes something else than down(silu(gate) * up) with gate first: at activations of "
                        f"{scale:g} its {what} differs by {error:.1g} times its largest value"
                    )
    return ""


def _sample(experts: nn.Module, projections: Projections, generator: torch.Generator) -> nn.Module:
    """Return a copy of the layer with two random experts, all else the same."""
    kind = type(experts)
    sample = kind.__new__(kind)
    parameters = {
        name: _random(parameter.shape, parameter.shape[1 if projections.input_first else 2], generator)
        for name, parameter in experts.named_parameters()
    }
    vars(sample).update(vars(experts), _parameters=parameters, _moe_fusion=Fusion(projections))
    if hasattr(experts, "num_experts"):
        vars(sample)["num_experts"] = min(_EXPERTS, len(next(experts.parameters())))
    config = getattr(experts, "config", None)
    if hasattr(config, "_experts_implementation"):
        # Its other kernels compute the same, but not on every device and in every dtype.
        vars(sample)["config"] = copy.copy(config)
        vars(sample)["config"]._experts_implementation = "eager"
    return sample


def _random(shape: torch.Size, width: int, generator: torch.Generator) -> Tensor:
    """Return random projections that keep the scale of inputs of this width."""
    sizes = (min(_EXPERTS, shape[0]), *shape[1:])
    drawn = torch.randn(sizes, generator=generator, dtype=torch.float64, device="cpu")
    return drawn.mul_(width**-0.5)


def _inputs(
    sample: nn.Module, projections: Projections, scale: float, generator: torch.Generator
) -> tuple[Tensor, ...]:
    down: Tensor = getattr(sample, projections.down)
    width = down.shape[2 if projections.input_first else 1]

    def draw(*sizes: int) -> Tensor:
        return torch.rand(sizes, generator=generator, dtype=torch.float64, device="cpu")

    x_TD = (draw(_TOKENS, width) - 0.5).mul_(scale).requires_grad_()
    ids_TK = draw(_TOKENS, len(down)).argsort(-1)
    return x_TD, ids_TK, draw(*ids_TK.shape).requires_grad_()


def _results(kind: Any, sample: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Return the output and the gradients of hidden states and gate weights."""
    x_TD, _, weights_TK = inputs
    y_TD = kind.forward(sample, *inputs)
    return y_TD.detach(), *torch.autograd.grad(y_TD.square().sum(), (x_TD, weights_TK))


def _relative_error(one: Tensor, other: Tensor) -> float:
    size = one.abs().max()
    return ((one - other).abs().max() / size).item() if one.shape == other.shape else torch.inf
