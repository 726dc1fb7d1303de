"""Checks that must pass for every family: the battery for any model, and what is about transformers.

Shape legend: E experts.
"""

from __future__ import annotations

import copy
import inspect
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel

from moe_plugin.attach.balance import balance_
from moe_plugin.attach.balanced_model import BalancedModel, find_balanced
from moe_plugin.attach.site import Site
from moe_plugin.attach.verification.battery import CHECKS, CheckResult, verify_model
from moe_plugin.balancing.rules import Sign
from tests.families import odd_gates
from tests.families.gates import explained
from tests.families.inputs import inputs_of, tokens_at

LARGE = 100.0
# Slow here; test_usage.py compiles some families. The inputs have too few tokens for a rule.
LEFT_OUT = {"compile", "default_rule_balances", "checkpointing", "inference_mode", "functional_call"}
# What a check may find besides that it passes: in which families, and the table's note.
LIMITS = {
    ("bf16", "skipped"): (["inkling2", "inkling2_loop"], "transformers cannot cast it to bf16"),
    ("unbiased_gates", "skipped"): (["doge"], ""),  # `odd_gates` computes its gate weights
}


@dataclass(frozen=True)
class Verified:
    """What the checks found about a family."""

    router: str
    driven: str
    experts: str
    gates: str
    notes: str


def verify(model: PreTrainedModel) -> Verified:
    """Run every check; the model comes back untouched, except for what its first forward sets.

    Raises:
        AssertionError: If something does not hold.
    """
    inputs = inputs_of(model)
    labelled = _with_labels(model, inputs)
    results = verify_model(model, lambda copied: copied(**labelled), checks=CHECKS.keys() - LEFT_OUT)
    _evaluate(model, inputs)  # some hosts set attributes in their first forward
    exact, checkpoints = _reloads_exactly(model, inputs), _checkpoints(model, inputs)
    copied = copy.deepcopy(model)
    balanced = balance_(copied, Sign(rate=0.5))
    counts_are_exact(copied, balanced, inputs)
    counts_are_exact_under_checkpointing(copied, inputs, checkpoints)
    gates = gate_weights(copied, balanced, inputs)
    update_moves_bias(copied, balanced, inputs)
    notes = bias_survives_saving(copied, balanced, inputs if exact else None)
    notes += _limits_of(results, model.config.model_type) + _limits_of_checkpointing(model, checkpoints)
    return _described(balanced, gates, notes)


def default_rule_balances(model: PreTrainedModel) -> None:
    """Check that the default rule balances the model, on more tokens than the other checks need.

    Raises:
        AssertionError: If it does not.
    """
    many = inputs_of(model, batch=16, length=32)
    (result,) = verify_model(model, lambda copied: copied(**many), checks=["default_rule_balances"])
    assert result.status != "failed", result


def _limits_of(results: list[CheckResult], family: str) -> list[str]:
    """Return what the battery found, for the table; every check passes except for known limits."""
    notes = []
    for result in results:
        if result.status != "passed":
            families, note = LIMITS.get((result.name, result.status), ([], ""))
            assert family in families, f"{family}: {result}"
            notes += [note] if note else []
    return notes


def counts_are_exact(model: PreTrainedModel, balanced: BalancedModel, inputs: dict[str, Any]) -> None:
    """Check that each site counts its valid tokens times k."""
    balanced.discard_counts_()
    _step(model, inputs)
    for name, site in balanced.items():
        expected = tokens_at(name, inputs) * site.top_k
        assert site.counts.sum() == expected, f"{name} counted {site.counts.tolist()}, expected {expected}"


def counts_are_exact_under_checkpointing(
    model: PreTrainedModel, inputs: dict[str, Any], kinds: list[bool]
) -> None:
    """Check that recomputation does not count, in both kinds of checkpointing."""
    for use_reentrant in kinds:
        copied = copy.deepcopy(model)  # transformers leaves hooks behind
        copied.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        balanced = find_balanced(copied)
        assert balanced is not None
        balanced.discard_counts_()
        _step(copied, inputs)
        for name, site in balanced.items():
            # Reentrant checkpointing of a first layer called without positional inputs has no backward at all.
            trained = any(parameter.grad is not None for parameter in site.router.parameters())
            expected = tokens_at(name, inputs) * site.top_k if trained else 0
            assert site.counts.sum() == expected, f"{name} counted {site.counts.tolist()} when checkpointed"


def gate_weights(model: PreTrainedModel, balanced: BalancedModel, inputs: dict[str, Any]) -> str:
    """Check that gate weights follow from unbiased scores while a large bias draws every token.

    Returns:
        Their formulas.
    """
    found: dict[str, list[str]] = {name: [] for name in balanced}
    before = {name: site.bias.clone() for name, site in balanced.items()}
    handles = [
        site.router.register_forward_hook(_explain(site, found[name])) for name, site in balanced.items()
    ]
    for site in balanced.values():
        site.bias[1] += LARGE
    counts_are_exact(model, balanced, inputs)
    _evaluate(model, inputs)
    for name, site in balanced.items():
        if not (site.style.zeros_masked and not site.host_owns_bias):  # closed groups stay closed
            drawn = int(site.counts[1])
            assert drawn == tokens_at(name, inputs), f"{name}: a large bias drew {drawn} tokens"
        site.bias.copy_(before[name])
    for handle in handles:
        handle.remove()
    assert all(found.values()), f"gate weights not checked: {found}"
    return ", ".join(dict.fromkeys(formula for formulas in found.values() for formula in formulas))


def update_moves_bias(model: PreTrainedModel, balanced: BalancedModel, inputs: dict[str, Any]) -> None:
    """Check that an update moves every site's bias."""
    before = {name: site.bias.clone() for name, site in balanced.items()}
    counts_are_exact(model, balanced, inputs)
    balanced.update()
    for name, site in balanced.items():
        assert not torch.equal(site.bias, before[name]), f"{name}: the update moved nothing"


def bias_survives_saving(
    model: PreTrainedModel, balanced: BalancedModel, inputs: dict[str, Any] | None
) -> list[str]:
    """Check that the host's biases are in its own checkpoint, ours in the sidecar file.

    Returns:
        What transformers itself loses when it loads the model.
    """
    notes = []
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        balanced.save(Path(folder) / "bias")
        loaded = type(model).from_pretrained(folder).train()
        expected = None if inputs is None else _evaluate(model, inputs)
        saved = load_file(Path(folder) / "model.safetensors")
        reloaded = balance_(loaded, Sign(rate=0.5))
        for name, site in reloaded.items():
            if not site.host_owns_bias:
                continue
            assert any(_holds_bias(tensor, balanced[name]) for tensor in saved.values()), (
                f"{name}: bias not saved"
            )
            if not torch.equal(site.bias, balanced[name].bias):
                notes = ["transformers resets the bias when loading: load the sidecar after it"]
        if all(site.host_owns_bias for site in balanced.values()) and inputs is not None and not notes:
            torch.testing.assert_close(_evaluate(loaded, inputs), expected)
        reloaded.load(Path(folder) / "bias")
    if inputs is not None:
        torch.testing.assert_close(_evaluate(loaded, inputs), expected)
    return notes


def _reloads_exactly(model: PreTrainedModel, inputs: dict[str, Any]) -> bool:
    """Return whether the host without balancing gives the same outputs when saved and loaded."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        loaded = type(model).from_pretrained(folder).train()
    return torch.allclose(_evaluate(model, inputs), _evaluate(loaded, inputs), rtol=1e-4, atol=1e-5)


def _checkpoints(model: PreTrainedModel, inputs: dict[str, Any]) -> list[bool]:
    """Return the values of ``use_reentrant`` with which the host without balancing can be trained."""
    working = []
    for use_reentrant in (False, True) if model.supports_gradient_checkpointing else ():
        copied = copy.deepcopy(model)
        copied.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        try:
            _step(copied, inputs)
        except RuntimeError:
            continue
        working.append(use_reentrant)
    return working


def _limits_of_checkpointing(model: PreTrainedModel, checkpoints: list[bool]) -> list[str]:
    if not model.supports_gradient_checkpointing or len(checkpoints) == 2:
        return []
    return [f"transformers cannot train it with {'one' if checkpoints else 'either kind of'} checkpointing"]


def _holds_bias(tensor: Tensor, site: Site) -> bool:
    """Return whether the tensor is the site's bias, or a stack with it, as some checkpoint formats have."""
    rows = tensor.float().reshape(-1, tensor.shape[-1]) if tensor.dim() else tensor[None, None]
    return rows.shape[1] == site.num_experts and bool((rows == site.bias).all(1).any())


def _step(model: PreTrainedModel, inputs: dict[str, Any]) -> Tensor:
    model.zero_grad()
    output = model(**inputs)[0]
    output.float().square().mean().backward()
    return output.detach()


@torch.no_grad()
def _evaluate(model: PreTrainedModel, inputs: dict[str, Any]) -> Tensor:
    model.eval()
    torch.manual_seed(0)
    output = model(**inputs)[0]
    model.train()
    return output


def _evaluate(model: PreTrainedModel, inputs: dict[str, Any]) -> Tensor:
    model.eval()
    torch.manual_seed(0)
    output = model(**inputs)[0]
    model.train()
    return output


def _with_labels(model: PreTrainedModel, inputs: dict[str, Any]) -> dict[str, Any]:
    """Return the inputs with labels if the host takes them, which makes its own loss the first output."""
    if "labels" not in inspect.signature(model.forward).parameters:
        return inputs
    labelled = {**inputs, "labels": inputs.get("decoder_input_ids", inputs["input_ids"])}
    try:
        _step(copy.deepcopy(model), labelled)
    except (RuntimeError, ValueError, TypeError, IndexError):
        return inputs
    return labelled


def _explain(site: Site, found: list[str]) -> Any:
    @torch.no_grad()
    def hook(router: Any, args: Any, output: Any) -> None:
        formula = odd_gates.explained(router, args[0], output, site.bias)
        if formula is None and site.style.kind != "adapter":
            formula = explained(output, site.num_experts, site.top_k)
        assert formula is not None, f"{site.name}: gate weights not checked"
        found.append(formula)

    return hook


def _described(balanced: BalancedModel, gates: str, notes: list[str]) -> Verified:
    sites = list(balanced.values())

    def each(values: list[str]) -> str:
        return ", ".join(dict.fromkeys(values))

    return Verified(
        router=each([type(site.router).__name__ for site in sites]),
        driven=each([_driven(site) for site in sites]),
        experts=each([f"{site.num_experts}/{site.top_k}" for site in sites]),
        gates=gates,
        notes="; ".join(notes),
    )


def _driven(site: Site) -> str:
    if site.style.kind == "adapter":
        return "adapter"
    how = f"own bias, {site.style.kind}"
    return (
        f"`{site.bias_place.name}` of {type(site.bias_place.owner).__name__}" if site.host_owns_bias else how
    )
