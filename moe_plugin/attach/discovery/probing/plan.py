"""Which rankings of the experts in a forward select them, which repeat a selection, and which are for something else.

Shape legend: T tokens, K experts selected per token, E experts.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch

from moe_plugin.attach.discovery.probing.ranking import Ranking
from moe_plugin.attach.discovery.probing.ranking_calls import FUNCTIONS
from moe_plugin.attach.discovery.routing_style import NoStyle, Plan, Role

_OTHER_FORM = "takes its gate weights from another ranking than its experts, of another form"


def plan_of(
    rankings: Sequence[Ranking], selecting: Sequence[Ranking], biases: Collection[str]
) -> tuple[Ranking, Plan] | NoStyle:
    """Return the ranking that selects, the last of them if there are rounds, and the plan of a forward.

    Where one decision ranks two tensors, as ``logits.argmax()`` for the ids and ``probs.max()`` for the gate weights,
    the first call selects and the others repeat what it selected.

    Args:
        rankings: All rankings, in order.
        selecting: Those that select: one, or one per round.
        biases: Names of followed tensors that may be the model's own bias: with and without it are different decisions.
    """
    last = selecting[-1]
    of_experts = [each for each in rankings if each.call.num_items == last.call.num_items]
    if len(selecting) > 1 and any(_gives_gates(each, selecting) for each in of_experts):
        return NoStyle(_OTHER_FORM, True)
    repeating, certain = [], last.ended
    for each in of_experts if len(selecting) == 1 else ():
        if each is last or not _may_repeat(each, last, set(biases)):
            continue
        same = _is_same_choice(each, last)
        if same is False and each.ids_used:
            return NoStyle("ranks its experts by different scores, and uses both rankings", True)
        if same is not False:
            repeating.append(each)
            certain = certain and same is True
    group = sorted((*repeating, *selecting), key=lambda each: each.number)
    if repeating and not _can_repeat(group):
        return NoStyle(_OTHER_FORM, True)
    selecting = group[:1] if repeating else selecting
    return selecting[-1], _planned(of_experts, selecting, group, certain)


def _planned(
    of_experts: Sequence[Ranking], selecting: Sequence[Ranking], group: Sequence[Ranking], certain: bool
) -> Plan:
    def role(each: Ranking) -> Role:
        if each in selecting:
            return Role.SELECTS
        return Role.REPEATS if each in group else Role.OTHER

    kind = group[0].call.kind if len({FUNCTIONS[each.call.kind] for each in group}) == 1 else "any"
    seen = [each for each in of_experts if FUNCTIONS[each.call.kind] <= FUNCTIONS[kind]]
    return Plan(tuple(map(role, seen)), kind, certain)


def _may_repeat(each: Ranking, last: Ranking, biases: set[str]) -> bool:
    """Return whether this call may make the choice of the last one: of the same size, neither based on the other.

    A maximum that is subtracted from the scores belongs to those, whatever is selected. What is not returned, or an
    earlier one that gives ids only where the last one gives gate weights too, is for something else, such as a loss.
    """
    if each.hard or each.number in last.after or last.number in each.after:
        return False
    if each.added & biases != last.added & biases:
        return False
    if last.returned and not each.returned and each.call.scores is not last.call.scores:
        return False
    if each.number < last.number and last.values_used and not each.values_used:
        return False
    return each.num_used == last.k and not (each.shifts or each.compared)


def _gives_gates(each: Ranking, rounds: Sequence[Ranking]) -> bool:
    """Return whether this call ranks once as many experts as are selected in rounds, for values that are returned.

    Values that the scores of the rounds depend on, such as their sum by which those are divided, are no gate weights.
    """
    is_other = each.number not in {ranking.number for ranking in rounds} | rounds[0].after
    is_of_scores = not (each.hard or each.shifts or each.compared)
    return is_other and is_of_scores and each.returned and each.values_used and each.num_used == len(rounds)


def _can_repeat(group: Sequence[Ranking]) -> bool:
    """Return whether the others can return experts that the first has returned."""
    sizes = [each.call.k or each.call.num_items for each in group]
    alike = {(each.call.largest, each.use.from_end and each.ids_used) for each in group}
    return len(alike) == 1 and max(sizes) == sizes[0] and (len(set(sizes)) == 1 or not group[0].use.from_end)


def _is_same_choice(one: Ranking, other: Ranking) -> bool | None:
    """Return whether two rankings choose the same for every token, up to ties; None without data."""
    if one.call.scores is other.call.scores and one.call.largest == other.call.largest:
        return True
    if one.call.scores.is_meta or other.call.scores.is_meta:
        return None
    return _fits(one, other) or _fits(other, one)


@torch.no_grad()
def _fits(one: Ranking, other: Ranking) -> bool:
    """Return whether the ids that one chose are such that the other, ranking its own scores, could have chosen."""
    scores_TE = other.call.scores.detach().movedim(other.call.dim, -1)
    ids_TK, own_TK = (_chosen(each, other.k) for each in (one, other))
    if ids_TK.shape != own_TK.shape:
        return False
    values_TK, best_TK = (scores_TE.gather(-1, ids).sort(-1).values for ids in (ids_TK, own_TK))
    return torch.equal(values_TK, best_TK)


def _chosen(ranking: Ranking, k: int) -> torch.Tensor:
    ids = ranking.ids if ranking.call.keepdim else ranking.ids.unsqueeze(ranking.call.dim)
    ids_TN = ids.movedim(ranking.call.dim, -1)
    return ids_TN[..., -k:] if ranking.use.from_end else ids_TN[..., :k]
