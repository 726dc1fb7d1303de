"""The load and bias of layers, and how often the bias flips a choice, over all of training, in bounded memory.

Shape legend: N windows of training steps, E experts, L layers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moe_plugin.callbacks.monitor.router_sample import Decisions
from moe_plugin.metrics import LayerLoad
from moe_plugin.metrics.router_names import short_names
from moe_plugin.plots.over_time import bias_over_time, flips_over_time, load_over_time

ROWS = 96
"""Rows of a picture at most, one for each window."""
LAYERS = 8
"""Layers that are shown at most, evenly spaced: the logs of deep models must stay small."""


class LoadOverTime:
    """One row for each window; when there are too many, neighbours are joined and time gets coarser.

    Args:
        names: The routers, in the order of the layers.
        state: Windows of an earlier part of the run, from `state_dict`; those of other routers are left out.
    """

    def __init__(self, names: Sequence[str], state: Mapping[str, Any] = MappingProxyType({})) -> None:
        """Start with the rows of the state."""
        self._short = short_names(names)
        self._names = [names[place] for place in spread(len(names), LAYERS)]
        self._steps: list[int] = []
        self._tokens: dict[str, list[np.ndarray]] = {name: [] for name in self._names}
        self._biases: dict[str, list[np.ndarray]] = {name: [] for name in self._names}
        self._flips: list[np.ndarray] = []
        if state.get("names") == self._names and state["steps"]:
            self._restore_(state)

    def state_dict(self) -> dict[str, Any]:
        """Return all windows as tensors and plain values."""
        return {
            "names": self._names,
            "steps": list(self._steps),
            "flips": _tensor(self._flips),
            "tokens": {name: _tensor(rows) for name, rows in self._tokens.items()},
            "biases": {name: _tensor(rows) for name, rows in self._biases.items()},
        }

    def add_(
        self,
        step: int,
        loads: Mapping[str, LayerLoad],
        bias: Mapping[str, Tensor],
        decisions: Mapping[str, Decisions],
    ) -> None:
        """Add a window.

        Args:
            step: The step at its end.
            loads: The load of each router.
            bias: The bias of each at its end.
            decisions: How those that were looked at decided.
        """
        self._steps.append(step)
        self._flips.append(
            np.array([decisions[name].flip_rate if name in decisions else np.nan for name in self._names])
        )
        for name in self._names:
            self._tokens[name].append(np.asarray(loads[name].tokens_per_expert))
            self._biases[name].append(bias[name].float().cpu().numpy().copy())
        if len(self._steps) == ROWS:
            self._join_()

    def images(self) -> Iterator[tuple[str, np.ndarray]]:
        """Yield the tag and picture of each layer's load and bias, from the first window to the last."""
        for name in self._names if self._steps else ():
            tokens_NE, bias_NE = np.stack(self._tokens[name]), np.stack(self._biases[name])
            yield (
                f"load_over_time/{self._short[name]}",
                load_over_time(tokens_NE, self._steps),
            )
            if bias_NE.any():
                yield (
                    f"bias_over_time/{self._short[name]}",
                    bias_over_time(bias_NE, self._steps),
                )
        if self._flips and np.nan_to_num(self._flips).any():
            yield (
                "flips_over_time/all",
                flips_over_time(
                    np.stack(self._flips), self._steps, [self._short[name] for name in self._names]
                ),
            )

    def _restore_(self, state: Mapping[str, Any]) -> None:
        self._steps, self._flips = list(state["steps"]), _rows(state["flips"])
        for name in self._names:
            self._tokens[name] = _rows(state["tokens"][name])
            self._biases[name] = _rows(state["biases"][name])

    def _join_(self) -> None:
        self._steps, self._flips = self._steps[1::2], self._flips[1::2]
        for name in self._names:
            rows = self._tokens[name]
            self._tokens[name] = [a + b for a, b in zip(rows[::2], rows[1::2], strict=True)]
            self._biases[name] = self._biases[name][1::2]


def _tensor(rows: Sequence[np.ndarray]) -> Tensor:
    return torch.from_numpy(np.stack(rows)) if rows else torch.empty(0)


def _rows(tensor: Tensor) -> list[np.ndarray]:
    return list(tensor.cpu().numpy())


def spread(count: int, at_most: int) -> list[int]:
    """Return evenly spaced places, the first and the last included.

    Args:
        count: How many places there are.
        at_most: How many are returned at most.
    """
    if count <= at_most:
        return list(range(count))
    return [round(place * (count - 1) / (at_most - 1)) for place in range(at_most)]
