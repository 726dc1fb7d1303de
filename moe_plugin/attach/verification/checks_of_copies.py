"""Check that balancing leaves no trace when it is removed, and that copies of a balanced model are balanced."""

from __future__ import annotations

import copy
import io
from typing import Any

import torch
from torch import nn

from moe_plugin.attach.balanced_model import find_balanced
from moe_plugin.attach.verification.comparison import identical, require_alike
from moe_plugin.attach.verification.result import require
from moe_plugin.attach.verification.subject import Balanced, Subject, balanced_part


def remove(subject: Subject) -> str:
    """Check that balancing adds no key to the checkpoint, and that `remove` restores the model."""
    plain = subject.plain()
    expected, before, state = subject.evaluate(plain), _structure(plain), plain.state_dict()
    model, sites = subject.attached()
    require(list(model.state_dict()) == list(state), "balancing changes the keys of state_dict")
    subject.train(model)
    model.zero_grad()
    sites.remove()
    after = subject.evaluate(model)
    require(find_balanced(model) is None, "the model still counts as balanced")
    for name, described in _structure(model).items():
        what = ("class", "attributes", "hooks")
        wrong = [w for w, now, then in zip(what, described, before[name], strict=True) if now != then]
        require(not wrong, f"{name or 'the model'}: remove() leaves other {' and '.join(wrong)} behind")
    left = model.state_dict()
    require(list(left) == list(state), "remove() leaves other keys in state_dict")
    changed = [key for key, value in state.items() if not _same_value(value, left[key])]
    require(not changed, f"remove() leaves other values in state_dict: {changed[:3]}")
    require_alike(expected, after, identical, "after remove()")
    return ""


def deepcopy(subject: Subject) -> str:
    """Check that a deepcopy of a balanced model selects and counts as the model does, without changing it."""
    balanced = subject.biased()
    _is_twin(subject, balanced, balanced_part(copy.deepcopy(balanced.model)))
    return ""


def pickle(subject: Subject) -> str:
    """Check that a pickled and loaded model selects and counts as the model does."""
    subject.skip_unless_plain(_reloaded, what="pickled")
    balanced = subject.biased()
    _is_twin(subject, balanced, balanced_part(_reloaded(balanced.model)))
    return ""


def _reloaded(model: nn.Module) -> nn.Module:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


def _is_twin(subject: Subject, ours: Balanced, twin: Balanced) -> None:
    require(list(twin.sites) == list(ours.sites), f"the copy has the sites {list(twin.sites)}")
    for name, site in twin.sites.items():
        require(
            site.router is twin.model.get_submodule(name), f"{name}: the copy's site watches another module"
        )
        require(torch.equal(site.bias, ours.sites[name].bias), f"{name}: the copy has another bias")
        require(site.style == ours.sites[name].style, f"{name}: the copy routes in another way")
    for site in ours.sites.values():
        site.counters.discard_()
    outcome = subject.train(twin.model)
    for name, site in ours.sites.items():
        require(not site.counts.any(), f"{name}: a forward of the copy counts in the original")
    require_alike(subject.train(ours.model), outcome, identical, "in a copy")
    require(any(site.counts.any() for site in twin.sites.values()), "the copy counts nothing")
    for name, site in twin.sites.items():
        expected = ours.sites[name].counts.tolist()
        require(
            site.counts.tolist() == expected,
            f"{name}: the copy counts {site.counts.tolist()}, not {expected}",
        )
        site.bias.add_(1)
        require(not torch.equal(site.bias, ours.sites[name].bias), f"{name}: the copy shares its bias")


def _structure(model: nn.Module) -> dict[str, tuple[type, set[str], int]]:
    """Return class, names of attributes and tensors, and number of hooks of every module."""
    return {name: (type(part), _attributes(part), _num_hooks(part)) for name, part in model.named_modules()}


def _attributes(module: nn.Module) -> set[str]:
    return {*vars(module), *module._parameters, *module._buffers, *module._modules}


def _num_hooks(module: nn.Module) -> int:
    return sum(len(value) for name, value in vars(module).items() if name.endswith("_hooks"))


def _same_value(one: Any, other: Any) -> bool:
    """Compare entries of a state_dict; a bias of the model's own stays in fp32."""
    if not isinstance(one, torch.Tensor):
        return one is other or one == other
    return one.shape == other.shape and identical(one, other.to(one.dtype))
