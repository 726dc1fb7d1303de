"""Understand how one module routes: how many experts, how many per token, by which call, with which bias.

Shape legend: T tokens, K experts selected per token, E experts.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from moe_plugin.adapters.code import uses
from moe_plugin.adapters.probe import NUM_TOKENS, Seen, probes
from moe_plugin.adapters.surroundings import Surroundings
from moe_plugin.adapters.trace import Ranking

EXPERT_COUNT_NAMES = (
    *("num_experts", "n_routed_experts", "num_local_experts", "n_experts", "num_routed_experts", "n_expert"),
    *("moe_num_experts", "num_moe_experts", "total_experts", "router_num_experts"),
)
TOP_K_NAMES = (
    *(
        "top_k",
        "num_experts_per_tok",
        "topk",
        "n_expert_per_token",
        "experts_per_token",
        "num_experts_per_token",
    ),
    *("moe_k", "moe_topk", "moe_top_k", "num_selected_experts", "top_k_experts", "n_activated_experts"),
)
BIAS_NAMES = ("e_score_correction_bias", "expert_bias", "balancing_biases", "score_bias", "correction_bias")
GROUP_COUNT_NAMES = (
    "num_groups",
    "num_group",
    "n_group",
    "num_expert_groups",
    "num_expert_group",
    "n_groups",
)
_TOP_K = frozenset({"topk"})
_LIKE_A_BIAS = re.compile(r".+_bias(es)?|bias(es)?_.+|.*(correction|balanc|static).*")
_KINDS = (("topk",), ("sort", "argsort"), ("argmax",), ("max",))

Owners = Mapping[str, tuple[nn.Module, str]]


@dataclass(frozen=True)
class Style:
    """How a module routes.

    Attributes:
        num_experts: E.
        top_k: K.
        kind: The kind of call that selects, see `moe_plugin.adapters.selecting.Call`.
        bias: Key in ``Surroundings.tensors`` of the host's own selection bias.
        zeros_masked: Whether groups of experts are ranked first, so that an exact zero may mean a closed group.
        proven: Whether the above was seen in a run, and not read from names.
    """

    num_experts: int
    top_k: int
    kind: str = "topk"
    bias: str | None = None
    zeros_masked: bool = False
    proven: bool = False


@dataclass(frozen=True)
class NoStyle:
    """Why a module that ranks something like experts cannot be balanced."""

    reason: str


def understand(around: Surroundings) -> Style | NoStyle | None:
    """How the innermost module of ``around`` routes; None if it does not, or nobody can tell."""
    if not (around.has_experts() or around.expert_counts() or around.configured_counts()):
        return None
    owners = around.tensors()
    followed = {key: getattr(owner, name) for key, (owner, name) in owners.items()}
    module, *above = around.modules
    hosts = [*above[:1], module, *above[1:]]  # what holds the router may pass it the bias
    reasons, ended = [], False
    for seen in probes(module, hosts, around.widths(), followed):
        style = _by_run(around, owners, seen)
        if isinstance(style, Style):
            return style
        reasons += [style] if style is not None else []
        ended = ended or seen.returned is not None
    return reasons[0] if reasons else None if ended else _by_names(around, owners)


def _by_run(around: Surroundings, owners: Owners, seen: Seen) -> Style | NoStyle | None:
    rankings = [ranking for ranking in seen.rankings if _is_of_experts(around, ranking)]
    for kinds in _KINDS:
        chosen = [ranking for ranking in rankings if ranking.call.kind in kinds]
        if chosen:
            return _style(around, owners, seen, chosen)
    if any(_is_expert_choice(around, ranking) for ranking in seen.rankings):
        return NoStyle(
            "its experts choose their tokens (expert choice), so that their load is equal by construction"
        )
    return None


def _style(around: Surroundings, owners: Owners, seen: Seen, chosen: list[Ranking]) -> Style | NoStyle:
    ranking = chosen[-1]
    if ranking.call.kind == "argmax" and len(chosen) > 1:
        return NoStyle(
            f"it selects experts by {len(chosen)} calls of argmax, which only an adapter can tell apart"
        )
    num_experts = ranking.call.num_items
    ranks_fewer = any(other.call.num_items < num_experts for other in seen.rankings)
    groups = around.number(GROUP_COUNT_NAMES)
    return Style(
        num_experts=num_experts,
        top_k=_stated_k(around.modules[0], {other.k for other in chosen}) or ranking.k,
        kind=ranking.call.kind,
        bias=_bias(owners, seen, ranking, num_experts),
        zeros_masked=groups > 1 if groups else ranks_fewer,
        proven=True,
    )


def _stated_k(module: nn.Module, seen: set[int]) -> int | None:
    """What the router itself says K is, if no selection seen agrees: its first real forward will then tell."""
    stated = [getattr(module, name) for name in TOP_K_NAMES if isinstance(getattr(module, name, None), int)]
    return stated[0] if stated and not seen & set(stated) else None


def _is_of_experts(around: Surroundings, ranking: Ranking) -> bool:
    size = ranking.call.num_items
    if ranking.call.scores.numel() != NUM_TOKENS * size or ranking.k > size:
        return False
    named = around.has_experts() or size in around.configured_counts()
    return size in around.expert_counts() or (named and size in around.gate_sizes())


def _is_expert_choice(around: Surroundings, ranking: Ranking) -> bool:
    counts = around.expert_counts()
    others = set(ranking.call.scores.shape) - {NUM_TOKENS}
    return ranking.call.num_items == NUM_TOKENS and ranking.call.kind == "topk" and bool(others & counts)


def _bias(owners: Owners, seen: Seen, ranking: Ranking, num_experts: int) -> str | None:
    """The tensor that moves the ranking and nothing else: what is added to the scores, but not in what is returned."""
    keys = [key for key in owners if key in ranking.added and _tensor(owners, key).numel() == num_experts]
    known = [key for key in keys if owners[key][1] in BIAS_NAMES]
    if known:
        return known[0]
    if seen.returned is None:
        unused = [key for key in keys if key not in seen.used]
        return next((key for key in unused if _LIKE_A_BIAS.fullmatch(owners[key][1])), None)
    return next((key for key in keys if key not in seen.returned), None)


def _by_names(around: Surroundings, owners: Owners) -> Style | None:
    """What attribute names say, for modules that cannot be run on their own."""
    num_experts, top_k = around.number(EXPERT_COUNT_NAMES), around.number(TOP_K_NAMES)
    near = Surroundings(around.path[:2])
    if (
        num_experts is None
        or top_k is None
        or not (near.has_experts() and uses(type(near.modules[0]), _TOP_K))
    ):
        return None
    fitting = [key for key in owners if _tensor(owners, key).numel() == num_experts]
    return Style(
        num_experts=num_experts,
        top_k=top_k,
        bias=next((key for key in fitting if owners[key][1] in BIAS_NAMES), None),
        zeros_masked=(around.number(GROUP_COUNT_NAMES) or 1) > 1,
    )


def _tensor(owners: Owners, key: str) -> Tensor:
    owner, name = owners[key]
    return getattr(owner, name)
