"""Run the checks on a model: what everybody calls."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterator, Sequence

import torch
from torch import nn

from moe_plugin.attach.adapter import Adapter
from moe_plugin.attach.settings import Sites
from moe_plugin.attach.verification.checks_of_checkpointing import checkpointing
from moe_plugin.attach.verification.checks_of_copies import deepcopy, pickle, remove
from moe_plugin.attach.verification.checks_of_counts import counts
from moe_plugin.attach.verification.checks_of_modes import bf16, compile, functional_call, inference_mode
from moe_plugin.attach.verification.checks_of_outputs import small_bias, unbiased_gates, zero_bias
from moe_plugin.attach.verification.checks_of_selection import large_bias, random_bias
from moe_plugin.attach.verification.checks_of_updates import default_rule_balances, update_moves_bias
from moe_plugin.attach.verification.comparison import identical, require_alike
from moe_plugin.attach.verification.result import (
    MODEL_ERRORS,
    CheckFailed,
    CheckResult,
    CheckSkipped,
    first_line,
)
from moe_plugin.attach.verification.subject import Run, Subject
from moe_plugin.errors import ConfigError, MoEPluginError

__all__ = ["CHECKS", "CheckResult", "verify_model"]

CHECKS: dict[str, Callable[[Subject], str]] = {
    check.__name__: check
    for check in (
        *(zero_bias, counts, large_bias, random_bias, unbiased_gates, small_bias),
        *(update_moves_bias, default_rule_balances, remove, deepcopy, pickle),
        *(checkpointing, bf16, compile, inference_mode, functional_call),
    )
}
"""All checks by name, in the order in which they run."""


def verify_model(
    model: nn.Module,
    run: Run,
    *,
    adapters: Sequence[Adapter] = (),
    sites: Sites = None,
    checks: Collection[str] | None = None,
) -> list[CheckResult]:
    """Check on copies of a model that balancing does what it should, and nothing else.

    Args:
        model: The model; it is not changed.
        run: Calls a model on fixed inputs and returns its output. It is called many times, and must give the same
            result after the same seed.
        adapters: As for `balance_`.
        sites: As for `balance_`.
        checks: Names of the checks to run; None runs all of `CHECKS`.

    Returns:
        What each check found, in the order of `CHECKS`; or one failure if copies of the model do not run alike.

    Raises:
        AttachError: If the model has no routers that can be balanced.
        ConfigError: If there is no check of some name.
    """
    unknown = sorted(set(checks or ()) - CHECKS.keys())
    if unknown:
        raise ConfigError("checks", f"must be among {sorted(CHECKS)}", unknown)
    chosen = [name for name in CHECKS if checks is None or name in checks]
    devices = list(range(torch.cuda.device_count()))
    with torch.random.fork_rng(devices=devices):
        uncopied = _uncopied(model)
        if uncopied:
            return [CheckResult("copy", "failed", uncopied)]
        subject = Subject(model, run, adapters, sites)
        subject.prototype  # noqa: B018  (raises if nothing can be balanced)
        return [*_differing_runs(subject), *(_result(name, subject) for name in chosen)]


def _uncopied(model: nn.Module) -> str:
    """Return why the model cannot be copied; '' if it can."""
    try:
        copy.deepcopy(model)
    except MODEL_ERRORS as error:
        return f"copy.deepcopy must work on the model to check copies of it, got {first_line(error)}"
    return ""


def _differing_runs(subject: Subject) -> Iterator[CheckResult]:
    """Yield a failure if two copies without balancing give different outputs."""
    try:
        results = [run(subject.plain()) for run in (subject.evaluate, subject.train) for _ in range(2)]
        require_alike(results[0], results[1], identical, "without balancing, in two equal evaluation passes,")
        require_alike(results[2], results[3], identical, "without balancing, in two equal training steps,")
    except CheckFailed as failure:
        yield CheckResult("run", "failed", f"'run' must give the same result after the same seed: {failure}")


def _result(name: str, subject: Subject) -> CheckResult:
    try:
        return CheckResult(name, "passed", CHECKS[name](subject))
    except CheckSkipped as reason:
        return CheckResult(name, "skipped", str(reason))
    except CheckFailed as failure:
        return CheckResult(name, "failed", str(failure))
    except MoEPluginError as error:
        return CheckResult(name, "failed", f"{type(error).__name__}: {error}")
    except MODEL_ERRORS as error:
        return CheckResult(name, "failed", f"the balanced model raises {first_line(error)}")
