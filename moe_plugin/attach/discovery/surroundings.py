"""What is around a module in a model: where experts are, how many, and which tensors have one entry per expert.

Shape legend: E experts.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from types import FunctionType

from torch import Tensor, nn

from moe_plugin.experts.stacks import Stack, own_stacks

_EXPERT = re.compile(r"expert", re.IGNORECASE)
_SHARED = re.compile(r"shared|common", re.IGNORECASE)
REACH = 2
"""How many levels above a router its experts may be."""


@dataclass(frozen=True)
class Surroundings:
    """A module and the modules that hold it, innermost first, up to `REACH` levels and to the next list of layers."""

    path: tuple[tuple[str, nn.Module], ...]

    @classmethod
    def of(cls, model: nn.Module, name: str) -> Surroundings:
        """Return the surroundings of a module.

        Args:
            model: Any model.
            name: The module's name.
        """
        names = [name]
        while names[-1] and len(names) <= REACH:
            names.append(names[-1].rpartition(".")[0])
        path = [(each, model.get_submodule(each)) for each in names]
        lists = (nn.ModuleList, nn.ModuleDict)
        end = next((i for i, (_, each) in enumerate(path) if i and isinstance(each, lists)), len(path))
        return cls(tuple(path[:end]))

    @property
    def modules(self) -> list[nn.Module]:
        """The module itself, then what holds it."""
        return [module for _, module in self.path]

    def has_experts(self) -> bool:
        """Return whether a number, a part or a parameter is named after experts."""
        return any(_EXPERT.search(name) and not _SHARED.search(name) for name in self._names())

    def expert_counts(self) -> set[int]:
        """Return how many experts there may be: numbers named after them, and sizes of stacks."""
        return self.named_counts() | {stack.size for stack in self.stacks()}

    def named_counts(self) -> set[int]:
        """Return numbers named after experts."""
        return set().union(*map(_named_numbers, self.modules))

    def stacks(self) -> list[Stack]:
        """Return all stacks: lists of modules or parameters, and 3-D weights."""
        parts = {id(part): part for part in self._parts()}.values()
        return [stack for part in parts for stack in own_stacks(part)]

    def configured_counts(self) -> set[int]:
        """Return numbers in the configs that are named after experts; every module of a model may carry its config."""
        return {number for module in self.modules[:2] for number in _numbers_in_configs(module)}

    def gate_sizes(self) -> set[int]:
        """Return sizes of the module's own matrices: a gate has one output per expert."""
        matrices = [tensor for tensor in self.modules[0].parameters() if tensor.dim() == 2]
        return {size for tensor in matrices for size in tensor.shape}

    def widths(self) -> list[int]:
        """Return guesses of the width of the hidden states, those of the module's own matrices first."""
        matrices = _matrices(self.modules[0].modules()) or _matrices(self._parts())
        sizes = [size for matrix in matrices for size in reversed(matrix.shape) if size]
        return list(dict.fromkeys(sizes))[:4]

    def channels(self, kind: type[nn.Conv1d | nn.Conv2d]) -> list[int]:
        """Return guesses of the number of input channels, from the convolutions of this kind."""
        convolutions = [part for part in self.modules[0].modules() if isinstance(part, kind)]
        return list(dict.fromkeys(each.in_channels for each in convolutions))[:2]

    def number(self, names: tuple[str, ...]) -> int | None:
        """Return the first attribute of the modules or their configs with one of these names that is a number."""
        for module in self.modules[:2]:
            for holder in (module, getattr(module, "config", None)):
                for name in names:
                    value = getattr(holder, name, None)
                    if isinstance(value, int) and not isinstance(value, bool):
                        return value
        return None

    def tensors(self) -> dict[str, tuple[nn.Module, str]]:
        """Return owner and attribute of every tensor with more than one entry and at most one long dimension."""
        found = {}
        owners = [part for module in self.modules[:1] for part in module.modules()] + self.modules[1:]
        for number, owner in enumerate(owners):
            own = (*owner.named_parameters(recurse=False), *owner.named_buffers(recurse=False))
            for attribute, tensor in own:
                if tensor.numel() > 1 and tensor.numel() == max(tensor.shape) and tensor.is_floating_point():
                    found[f"{number}.{attribute}"] = (owner, attribute)
        return found

    def _parts(self) -> Iterator[nn.Module]:
        """Yield the modules of the path and those up to two levels below them."""
        for module in self.modules:
            yield module
            for child in module.children():
                yield child
                yield from child.children()

    def _names(self) -> Iterator[str]:
        for module in self.modules:
            yield from (name for name, _ in module.named_children())
            yield from (name for name, _ in module.named_parameters(recurse=False))
            yield from (name for name, value in vars(module).items() if isinstance(value, int))


def _named_numbers(holder: object) -> Iterator[int]:
    for name, value in (vars(type(holder)) | vars(holder)).items():
        if isinstance(value, int) and not isinstance(value, bool) and _EXPERT.search(name):
            yield value


def _numbers_in_configs(module: nn.Module) -> Iterator[int]:
    """Yield numbers named after experts in objects that the module holds, such as configs, and in objects in those."""
    for holder in (*vars(module).values(), getattr(type(module), "config", None)):
        for each in (holder, *getattr(holder, "__dict__", {}).values()):
            if hasattr(each, "__dict__") and not isinstance(each, (nn.Module, Tensor, type, FunctionType)):
                yield from _named_numbers(each)


def _matrices(modules: Iterable[nn.Module]) -> list[Tensor]:
    own = (tensor for module in modules for tensor in module._parameters.values())
    return [tensor for tensor in own if tensor is not None and tensor.dim() == 2]
