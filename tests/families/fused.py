"""Check whether a family's experts can be fused, and that they then compute what its own do."""

from __future__ import annotations

import copy
import re
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from moe_plugin.attach.balance import balance_
from moe_plugin.errors import AttachError
from tests.families.inputs import inputs_of

REASON = r"cannot here: (.*)\. Leave 'experts' out"


def fused(model: PreTrainedModel) -> str:
    """Return 'yes', or 'no' and why; the model stays untouched.

    Raises:
        AssertionError: If something does not hold.
    """
    inputs, other = inputs_of(model), copy.deepcopy(model)
    try:
        balanced = balance_(other, experts="fused")
    except AttachError as error:
        return f"no, {re.findall(REASON, str(error))[0]}"
    assert sorted(map(_layer, balanced.fused)) == sorted(map(_layer, balanced)), "one of each in each layer"
    results_agree(step(copy.deepcopy(model), inputs), step(other, inputs))
    one, another = saved(model), saved(other)
    assert another.keys() == one.keys(), "the checkpoint has other keys"
    assert all(torch.equal(tensor, one[name]) for name, tensor in another.items()), "other values are saved"
    balanced.update()  # raises if some were not called
    return "yes"


def _layer(name: str) -> str:
    """Return a module's name up to its layer's number."""
    return re.split(r"(?<=\.\d)\.", name)[0]


def results_agree(theirs: tuple[Tensor, dict[str, Tensor]], ours: tuple[Tensor, dict[str, Tensor]]) -> None:
    """Check that outputs and gradients differ by no more than rounding."""
    (output, gradients), (output2, gradients2) = theirs, ours
    torch.testing.assert_close(output2, output, atol=1e-5, rtol=1e-4)
    assert gradients2.keys() == gradients.keys(), "other gradients"
    for name, gradient in gradients.items():
        error = (gradients2[name] - gradient).abs().max()
        assert error <= 2e-5 * gradient.abs().max(), f"gradient of {name} differs by {error}"


def step(model: nn.Module, inputs: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
    """Return output and gradients."""
    torch.manual_seed(0)
    output = model(**inputs)[0]
    output.float().square().mean().backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return output.detach(), gradients


def saved(model: PreTrainedModel) -> dict[str, Tensor]:
    """Return the tensors of its own checkpoint."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return load_file(Path(folder) / "model.safetensors")
