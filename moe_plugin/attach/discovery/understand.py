"""Understand how one module routes: how many experts, how many per token, by which call, with which bias.

Shape legend: T tokens, K experts selected per token, E experts.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace

import torch
from torch import nn

from moe_plugin.attach.discovery.code_names import TOP_K, uses
from moe_plugin.attach.discovery.probing.decision import Decision, decide
from moe_plugin.attach.discovery.probing.input_guesses import NUM_TOKENS, Input, inputs
from moe_plugin.attach.discovery.probing.probe import Seen, probes
from moe_plugin.attach.discovery.probing.ranking import Ranking
from moe_plugin.attach.discovery.routing_style import NoStyle, Plan, RoutingStyle
from moe_plugin.attach.discovery.surroundings import Surroundings

EXPERT_COUNT_NAMES = (
    *("num_experts", "n_routed_experts", "num_local_experts", "n_experts", "num_routed_experts", "n_expert"),
    *("moe_num_experts", "num_moe_experts", "total_experts", "router_num_experts"),
)
TOP_K_NAMES = (
    *("top_k", "num_experts_per_tok", "topk", "n_expert_per_token", "experts_per_token"),
    "num_experts_per_token",
    *("moe_k", "moe_topk", "moe_top_k", "num_selected_experts", "top_k_experts", "n_activated_experts"),
)
BIAS_NAMES = ("e_score_correction_bias", "expert_bias", "balancing_biases", "score_bias", "correction_bias")
GROUP_COUNT_NAMES = (
    *("num_groups", "num_group", "n_group", "num_expert_groups", "num_expert_group", "n_groups"),
)
_LIKE_A_BIAS = re.compile(r".+_bias(es)?|bias(es)?_.+|.*(correction|balanc|static).*")
_STACK = "stack."

Owners = Mapping[str, tuple[nn.Module, str]]


def understand(around: Surroundings) -> RoutingStyle | NoStyle | None:
    """Return how the innermost module of ``around`` routes; None if it does not, or if that is unknown."""
    if not (around.has_experts() or around.expert_counts() or around.configured_counts()):
        return None
    owners = around.tensors()
    followed = {key: getattr(*place) for key, place in owners.items()}
    followed |= {
        f"{_STACK}{n}.{i}": tensor
        for n, stack in enumerate(around.stacks())
        for i, tensor in enumerate(stack.tensors)
    }
    module, *above = around.modules
    hosts = [*above[:1], module, *above[1:]]  # what holds the router may pass it the bias
    broken_off, reasons, ended = None, list[NoStyle](), False
    for seen in probes(module, hosts, _inputs(around), followed):
        style, doubted = _by_run(around, owners, seen), any(reason.adaptable for reason in reasons)
        if isinstance(style, NoStyle):
            reasons.append(style)
        elif style is not None and seen.returned is not None:
            return _in_doubt(style) if doubted else style
        elif broken_off is None and not doubted:
            broken_off = style
        ended = ended or seen.returned is not None
    if broken_off is not None or not (reasons or ended):
        return broken_off or _by_names(around, owners)
    return reasons[0] if reasons else None


def _in_doubt(style: RoutingStyle) -> RoutingStyle:
    """Return the style for the first real forward to decide: with inputs of another shape it could not be steered."""
    evaluation, training = (plan._replace(certain=False) for plan in style.plans)
    return replace(style, plans=(evaluation, training))


def _inputs(around: Surroundings) -> Iterator[Input]:
    module = around.modules[0]
    dtype = next((p.dtype for p in module.parameters() if p.is_floating_point()), torch.float32)
    device = next((p.device for p in module.parameters()), torch.device("cpu"))
    channels = around.channels(nn.Conv1d), around.channels(nn.Conv2d)
    return inputs(around.widths(), *channels, dtype=dtype, device=device)


def _by_run(around: Surroundings, owners: Owners, seen: Seen) -> RoutingStyle | NoStyle | None:
    rankings = [ranking for ranking in seen.rankings if _is_of_experts(around, ranking)]
    found = [_bias(owners, seen, each, each.call.num_items) for each in rankings]
    biases = {key for key in found if key is not None}
    decision = decide(seen.rankings, rankings, NUM_TOKENS, _stated_k(around.modules[0]), biases)
    if isinstance(decision, Decision):
        return _made(around, owners, seen, decision, biases)
    if decision is not None:
        return decision
    if any(ranking.compared for ranking in rankings):
        return NoStyle(
            "selects experts by comparing scores with the k-th largest, which is not a ranking", True
        )
    for name, scores in seen.unsteerable:
        if any(scores.numel() == NUM_TOKENS * size for size in around.expert_counts()):
            return NoStyle(f"selects experts by {name}, which leaves no place for a bias", True)
    if any(_is_expert_choice(around, ranking) for ranking in seen.rankings if not ranking.hard):
        return NoStyle("lets its experts choose their tokens (expert choice), so their load is equal", False)
    return None


def _made(
    around: Surroundings, owners: Owners, seen: Seen, decision: Decision, biases: set[str]
) -> RoutingStyle:
    ranking = decision.ranking
    num_experts = ranking.call.num_items
    soft = [other for other in seen.rankings if not other.hard]
    ranks_fewer = any(other.call.num_items < num_experts for other in soft if other.k)
    groups = around.number(GROUP_COUNT_NAMES)
    return RoutingStyle(
        num_experts=num_experts,
        top_k=decision.top_k,
        kind=ranking.call.kind,
        use=decision.use,
        bias=_bias(owners, seen, ranking, num_experts) if ranking.draws_largest else None,
        zeros_masked=groups > 1 if groups else ranks_fewer,
        proven=True,
        plans=_plans(around, seen, decision, biases),
        tokens_per_entry=NUM_TOKENS / seen.num_entries if seen.num_entries else 0.0,
        example=seen.example,
    )


def _plans(around: Surroundings, seen: Seen, decision: Decision, biases: set[str]) -> tuple[Plan, Plan]:
    """Return the plans for evaluation and for training; what was seen in one mode only is uncertain in the other."""
    plan = other = decision.plan
    rankings = seen.again.rankings if seen.again else []
    again = decide(rankings, rankings, 2 * NUM_TOKENS, _stated_k(around.modules[0]), biases)
    if isinstance(again, Decision) and (again.top_k, again.use) == (decision.top_k, decision.use):
        other = again.plan
        plan = plan if other.roles else other  # several sequences are ranked one by one
    else:
        other = plan._replace(certain=False)
    return (other, plan) if around.modules[0].training else (plan, other)


def _stated_k(module: nn.Module) -> list[int]:
    """Return the numbers that the router declares as K."""
    return [getattr(module, name) for name in TOP_K_NAMES if isinstance(getattr(module, name, None), int)]


def _is_of_experts(around: Surroundings, ranking: Ranking) -> bool:
    """Return whether as many items were ranked as there are experts.

    A stack not named after experts must not have produced the scores: a classifier of two layers that takes the larger
    of two logits has no experts.
    """
    size = ranking.call.num_items
    if ranking.k > size:
        return False
    if size in around.named_counts():
        return True
    if (around.has_experts() or size in around.configured_counts()) and size in around.gate_sizes():
        return True
    sizes = {n: stack.size for n, stack in enumerate(around.stacks())}
    before = {int(key.split(".")[1]) for key in ranking.depends if key.startswith(_STACK)}
    return any(length == size for n, length in sizes.items() if n not in before)


def _is_expert_choice(around: Surroundings, ranking: Ranking) -> bool:
    counts = around.expert_counts()
    others = set(ranking.call.scores.shape) - {NUM_TOKENS}
    return ranking.call.num_items == NUM_TOKENS and ranking.call.kind == "topk" and bool(others & counts)


def _bias(owners: Owners, seen: Seen, ranking: Ranking, num_experts: int) -> str | None:
    """Return the tensor that moves only the ranking: added to the scores, and not part of the output."""
    keys = [key for key in owners if key in ranking.added and getattr(*owners[key]).numel() == num_experts]
    known = [key for key in keys if owners[key][1] in BIAS_NAMES]
    if known:
        return known[0]
    if seen.returned is None:
        unused = [key for key in keys if key not in seen.used]
        return next((key for key in unused if _LIKE_A_BIAS.fullmatch(owners[key][1])), None)
    return next((key for key in keys if key not in seen.returned), None)


def _by_names(around: Surroundings, owners: Owners) -> RoutingStyle | None:
    """Return how attribute names indicate that a module routes which cannot be run on its own."""
    num_experts, top_k = around.number(EXPERT_COUNT_NAMES), around.number(TOP_K_NAMES)
    near = Surroundings(around.path[:2])
    if num_experts is None or top_k is None:
        return None
    if not (near.has_experts() and uses(type(near.modules[0]), TOP_K)):
        return None
    fitting = [key for key in owners if getattr(*owners[key]).numel() == num_experts]
    return RoutingStyle(
        num_experts=num_experts,
        top_k=top_k,
        bias=next((key for key in fitting if owners[key][1] in BIAS_NAMES), None),
        zeros_masked=(around.number(GROUP_COUNT_NAMES) or 1) > 1,
    )
