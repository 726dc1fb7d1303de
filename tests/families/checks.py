"""Checks that must pass for every family, one function each.

Shape legend: E experts.
"""

from __future__ import annotations

import copy
import inspect
import io
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
from moe_plugin.balancing.rules import Sign
from tests.families import odd_gates
from tests.families.gates import explained
from tests.families.inputs import inputs_of, tokens_at

LARGE = 100.0


@dataclass(frozen=True)
class Verified:
    """What the checks found about a family."""

    router: str
    driven: str
    experts: str
    gates: str
    notes: str


def verify(model: PreTrainedModel) -> Verified:
    """Run every check; the model comes back untouched.

    Raises:
        AssertionError: If something does not hold.
    """
    inputs = inputs_of(model)
    _evaluate(model, inputs)  # some hosts set attributes in their first forward
    exact, in_bf16, checkpoints = (
        _reloads_exactly(model, inputs),
        _runs_in_bf16(model, inputs),
        _checkpoints(model, inputs),
    )
    untouched = {name: (type(part), set(vars(part))) for name, part in model.named_modules()}
    keys = list(model.state_dict())
    zero_bias_changes_nothing(model, inputs)
    balanced = balance_(model, Sign(rate=0.5))
    assert list(model.state_dict()) == keys, "state_dict has other keys"
    counts_are_exact(model, balanced, inputs)
    counts_are_exact_under_checkpointing(model, inputs, checkpoints)
    gates = large_bias_draws_every_token(model, balanced, inputs)
    bias_that_changes_no_selection_changes_nothing(model, balanced, inputs)
    update_moves_bias(model, balanced, inputs)
    copies_are_alike(model, inputs)
    notes = bias_survives_saving(model, balanced, inputs if exact else None)
    bias_stays_fp32_in_bf16(model, inputs if in_bf16 else None)
    notes += _limits_of_the_host(model, in_bf16, checkpoints)
    described = _described(balanced, gates, notes)
    balanced.remove()
    assert {name: (type(part), set(vars(part))) for name, part in model.named_modules()} == untouched, (
        "remove()"
    )
    return described


def zero_bias_changes_nothing(model: PreTrainedModel, inputs: dict[str, Any]) -> None:
    """Check that outputs, loss and gradients are bit-identical with a bias of zero."""
    inputs = _with_labels(model, inputs)
    results = []
    for attach in (False, True):
        copied = copy.deepcopy(model)
        if attach:
            balance_(copied)
        torch.manual_seed(0)
        output = _step(copied, inputs)
        grads = {name: p.grad for name, p in copied.named_parameters() if p.grad is not None}
        results.append((output, grads))
    (plain, plain_grads), (ours, our_grads) = results
    assert torch.equal(plain, ours), "outputs differ at zero bias"
    assert plain_grads.keys() == our_grads.keys(), "other gradients at zero bias"
    wrong = [name for name, grad in plain_grads.items() if not torch.equal(grad, our_grads[name])]
    assert not wrong, f"gradients differ at zero bias: {wrong}"


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


def large_bias_draws_every_token(
    model: PreTrainedModel, balanced: BalancedModel, inputs: dict[str, Any]
) -> str:
    """Check that every token selects an expert with a large bias, with gate weights from unbiased scores.

    Returns:
        The formulas of the gate weights.
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


def bias_that_changes_no_selection_changes_nothing(
    model: PreTrainedModel, balanced: BalancedModel, inputs: dict[str, Any]
) -> None:
    """Check that outputs are bit-identical while every token keeps its experts: no gate weight sees the bias."""
    before = {name: site.bias.clone() for name, site in balanced.items()}
    plain, chosen = _selections(model, balanced, inputs)
    generator = torch.Generator().manual_seed(2)
    kept = False
    for size in (1e-3, 1e-4, 1e-5, 1e-6):
        for name, site in balanced.items():
            site.bias.copy_(before[name] + size * torch.randn(before[name].shape, generator=generator))
        biased, chosen_now = _selections(model, balanced, inputs)
        if chosen_now == chosen:
            kept = True
            assert torch.equal(plain, biased), "the output depends on the bias beyond the selection"
    assert kept, "no bias was small enough to leave the selection alone"
    for name, site in balanced.items():
        site.bias.copy_(before[name])


def update_moves_bias(model: PreTrainedModel, balanced: BalancedModel, inputs: dict[str, Any]) -> None:
    """Check that an update moves every site's bias."""
    before = {name: site.bias.clone() for name, site in balanced.items()}
    counts_are_exact(model, balanced, inputs)
    balanced.update()
    for name, site in balanced.items():
        assert not torch.equal(site.bias, before[name]), f"{name}: the update moved nothing"


def copies_are_alike(model: PreTrainedModel, inputs: dict[str, Any]) -> None:
    """Check that a deepcopy and a pickle select as the model does."""
    expected = _evaluate(model, inputs)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    for other in (copy.deepcopy(model), torch.load(buffer, weights_only=False)):
        copied, balanced = find_balanced(other), find_balanced(model)
        assert copied is not None
        assert balanced is not None
        assert [(s.name, s.style) for s in copied.values()] == [(s.name, s.style) for s in balanced.values()]
        assert torch.equal(_evaluate(other, inputs), expected), "a copy gives another output"


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


def bias_stays_fp32_in_bf16(model: PreTrainedModel, inputs: dict[str, Any] | None) -> None:
    """Check that the model runs in bf16 with its biases unchanged."""
    cast = copy.deepcopy(model).bfloat16()
    balanced, before = find_balanced(cast), find_balanced(model)
    assert balanced is not None
    assert before is not None
    if inputs is not None:
        counts_are_exact(cast, balanced, inputs)
    for name, site in balanced.items():
        assert site.bias.dtype == torch.float32
        assert torch.equal(site.bias, before[name].bias), f"{name}: the cast changed the bias"


def _reloads_exactly(model: PreTrainedModel, inputs: dict[str, Any]) -> bool:
    """Return whether the host without balancing gives the same outputs when saved and loaded."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        loaded = type(model).from_pretrained(folder).train()
    return torch.allclose(_evaluate(model, inputs), _evaluate(loaded, inputs), rtol=1e-4, atol=1e-5)


def _runs_in_bf16(model: PreTrainedModel, inputs: dict[str, Any]) -> bool:
    """Return whether the host without balancing can be cast to bf16."""
    try:
        _step(copy.deepcopy(model).bfloat16(), inputs)
    except RuntimeError:
        return False
    return True


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


def _limits_of_the_host(model: PreTrainedModel, in_bf16: bool, checkpoints: list[bool]) -> list[str]:
    notes = [] if in_bf16 else ["transformers cannot cast it to bf16"]
    if model.supports_gradient_checkpointing and len(checkpoints) < 2:
        notes.append(
            f"transformers cannot train it with {'either kind of' if not checkpoints else 'one'} checkpointing"
        )
    return notes


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


def _selections(
    model: PreTrainedModel, balanced: BalancedModel, inputs: dict[str, Any]
) -> tuple[Tensor, list[list[int]]]:
    """Return the model's output, and the experts of every token at every site."""
    chosen: list[list[int]] = []
    for site in balanced.values():
        site.observer = lambda selection, _valid: chosen.append(selection.expert_ids_TK.flatten().tolist())
    output = _evaluate(model, inputs)
    for site in balanced.values():
        site.observer = None
    return output, chosen


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
