"""What must hold for the model of a `RouterSpec` once it is balanced.

Shape legend: E experts, T tokens, D model width.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from moe_plugin.attach.balance import balance_
from moe_plugin.balancing.rules import Sign
from moe_plugin.errors import AttachError
from tests.attach.discovery.wild_block import after_sign
from tests.attach.generated.block import Model, make_inputs
from tests.attach.generated.reference import Expected, reference
from tests.attach.generated.sides import CACHE, LEFT
from tests.attach.generated.spec import RANDOM, WHOLE_GRAPH, RouterSpec

RATE = 0.01
UNSTEERABLE = (*RANDOM, "expert choice")
"""Ways to select that no bias can steer, so balancing must refuse them."""
CLOSE = 1e-5
"""Share of the spread of scores below which rounding may decide between two experts."""


class Trial:
    """The model of a spec and an untouched copy."""

    def __init__(self, spec: RouterSpec) -> None:
        """Build both, and run the copy for what is expected of the other."""
        _take_effects(nn.Module())
        self.spec, self.x = spec, make_inputs(spec)
        self.model = Model(spec)
        self.plain = deepcopy(self.model)
        torch._dynamo.reset()
        self.calls = {model: _compiled(model, spec.mode) for model in (self.model, self.plain)}
        self.expected, self.effects = self.two_steps(self.plain), _take_effects(self.plain)

    def check(self) -> None:
        """Assert what must hold from `balance_` to `remove`."""
        before = _attributes(self.model)
        self.balanced = balance_(self.model, Sign(rate=RATE))
        assert not _take_effects(self.model), "balance_ left something behind outside of the model"
        assert _names(_attributes(self.model)) == _names(before), "balance_ left attributes behind"
        if self.balanced.refused:  # logged
            raise AttachError(str(self.balanced.refused))
        assert len(self.balanced) == len(self.model.layers), f"the sites are {list(self.balanced)}"
        self.check_unbiased()
        self.check_biased("small")
        self.check_update()
        self.check_biased("large")
        self.check_removed()

    def two_steps(self, model: Model) -> list[tuple[Tensor, list[Tensor | None]]]:
        """Return output and gradients of two training steps."""
        if self.spec.mode == "evaluation first":
            with torch.no_grad():
                model.eval()(self.x)
            model.train()
        return [self.step(model) for _ in range(2)]

    def step(self, model: Model) -> tuple[Tensor, list[Tensor | None]]:
        model.zero_grad()
        torch.manual_seed(self.spec.seed)
        x = self.x.clone().requires_grad_()
        out = self.calls[model](x)
        losses = [part.aux_loss for part in model.modules() if hasattr(part, "aux_loss")]
        (out.square().mean() + sum(losses)).backward()
        return out.detach(), [x.grad, *(parameter.grad for parameter in model.parameters())]

    def check_unbiased(self) -> None:
        alike = _close if self.spec.mode == "compiled by aot" else torch.equal
        _assert_same(self.two_steps(self.model), self.expected, "with a zero bias", alike)
        assert _take_effects(self.model) == self.effects, "forwards left other things behind than plain ones"
        totals = [int(site.counts.sum()) for site in self.balanced.values()]
        expected = [2 * self.spec.tokens * layer.spec.k for layer in self.plain.layers]
        assert totals == expected, f"counts sum to {totals} instead of {expected}"

    def check_biased(self, size: str) -> None:
        """Check two steps: interception may differ from one to the next."""
        answers = self.set_biases(size)
        for number in range(2):
            self.balanced.discard_counts_()
            out, _ = self.step(self.model)
            for each, site, right in zip(out, self.balanced.values(), answers, strict=True):
                problems = [_difference(self.spec.dtype, each, site.counts, answer) for answer in right]
                assert None in problems, f"with a {size} bias in step {number}: {problems}"

    def set_biases(self, size: str) -> list[list[Expected]]:
        """Give each site a bias that decides clearly, and return what is right with it."""
        torch.manual_seed(self.spec.seed)
        x_TD = self.x.flatten(0, 1)
        logits = [layer.routing.logits(x_TD).detach() for layer in self.plain.layers]
        answers = []
        for layer, logits_TE, site in zip(self.plain.layers, logits, self.balanced.values(), strict=True):
            scores_TE = layer.routing.score(logits_TE).float()
            for _ in range(100):
                bias_E = _draw_bias(layer.spec, scores_TE, size)
                right = reference(layer, x_TD, logits_TE, bias_E)
                if min(answer.margin for answer in right) > CLOSE * scores_TE.std():
                    break
            site.bias.copy_(bias_E)
            answers.append(right)
        return answers

    def check_update(self) -> None:
        before = [(site.bias.clone(), site.counts.clone()) for site in self.balanced.values()]
        self.balanced.update()
        for site, (bias_E, counts_E) in zip(self.balanced.values(), before, strict=True):
            torch.testing.assert_close(site.bias, after_sign(bias_E, counts_E, RATE))

    def check_removed(self) -> None:
        for site in self.balanced.values():
            site.bias.zero_()
        self.balanced.remove()
        _assert_same(self.two_steps(self.model), self.expected, "after remove()")
        assert _attributes(self.model) == _attributes(self.plain), "remove() left something behind"


def _compiled(model: nn.Module, mode: str) -> Any:
    backends = {"compiled": "eager", "compiled by aot": "aot_eager", WHOLE_GRAPH: "eager"}
    return (
        torch.compile(model, backend=backends[mode], fullgraph=mode == WHOLE_GRAPH)
        if mode in backends
        else model
    )


def _draw_bias(spec: RouterSpec, scores_TE: Tensor, size: str) -> Tensor:
    bias_E = torch.randn(spec.experts) * scores_TE.std()
    if spec.choice_bias:  # in zeros of closed groups the host would see the largest scores
        bias_E = bias_E.abs()
    if size == "large":
        bias_E[torch.randint(spec.experts, ())] += 1 + 10 * (scores_TE.max() - scores_TE.min())
    return bias_E


def _difference(dtype: str, out: Tensor, counts_E: Tensor, right: Expected) -> str | None:
    """Return what differs from this answer; None if nothing does."""
    off_T = (out.flatten(0, 1) - right.output_TD).abs().amax(-1)
    wrong = off_T > (0.05 if dtype == "bf16" else 1e-4)
    if counts_E.tolist() == right.counts and not wrong.any():
        return None
    return (
        f"{int(wrong.sum())} of {len(wrong)} outputs are off, by up to {float(off_T.max()):.3g}; "
        f"counts are {counts_E.tolist()} instead of {right.counts}"
    )


def _close(grad: Tensor, right: Tensor) -> bool:
    """Return whether gradients differ by no more than rounding: this compiler adds them up in another order."""
    return torch.allclose(grad, right, rtol=1e-5, atol=1e-6 * float(right.abs().amax()))


def _assert_same(
    found: list, expected: list, when: str, alike: Callable[[Tensor, Tensor], bool] = torch.equal
) -> None:
    for number, ((out, grads), (right_out, right_grads)) in enumerate(zip(found, expected, strict=True)):
        assert torch.equal(out, right_out), f"outputs differ {when} in step {number}"
        for grad, right in zip(grads, right_grads, strict=True):
            same = grad is right if grad is None or right is None else alike(grad, right)
            assert same, f"gradients differ {when} in step {number}"


def _take_effects(model: nn.Module) -> list:
    """Return numbers of calls, and what is left behind outside of the model, in a form to compare, and forget it."""
    found: list = [module.calls for module in model.modules() if hasattr(module, "calls")]
    found += [float("nan") if isinstance(each, FakeTensor) else float(each) for each in LEFT]
    found += [
        (name, type(value), isinstance(getattr(value, "loc", value), FakeTensor))
        for name, value in CACHE.items()
    ]
    LEFT.clear()
    CACHE.clear()
    return found


def _attributes(model: nn.Module) -> dict[str, tuple[type, dict[str, type]]]:
    """Return the class and the attributes of each module."""
    return {
        name: (type(module), {key: type(value) for key, value in vars(module).items()})
        for name, module in model.named_modules()
    }


def _names(attributes: dict) -> dict[str, set[str]]:
    """Return the names of attributes, except our own."""
    return {name: {each for each in kept if "moe_" not in each} for name, (_, kept) in attributes.items()}
