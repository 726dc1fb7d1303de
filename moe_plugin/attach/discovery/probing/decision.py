"""Decide from the rankings of one forward which of them select experts, and what the others are for.

Shape legend: T tokens, K experts selected per token, E experts.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import NamedTuple

from moe_plugin.attach.discovery.probing.plan import plan_of
from moe_plugin.attach.discovery.probing.ranking import Ranking
from moe_plugin.attach.discovery.probing.ranking_calls import Use
from moe_plugin.attach.discovery.routing_style import NoStyle, Plan

_KINDS = (("topk",), ("sort", "argsort"), ("argmax",), ("max",), ("argmin",), ("min",))


class Decision(NamedTuple):
    """How experts were selected in one forward.

    Attributes:
        ranking: The call that selects, or the last of them.
        top_k: K.
        use: How its result is used.
        plan: What each ranking of the experts is for.
    """

    ranking: Ranking
    top_k: int
    use: Use
    plan: Plan


def decide(
    rankings: Sequence[Ranking],
    of_experts: Collection[Ranking],
    num_tokens: int,
    stated_k: Collection[int] = (),
    biases: Collection[str] = (),
) -> Decision | NoStyle | None:
    """Decide how experts were selected; None if they were not.

    Args:
        rankings: All rankings of the forward.
        of_experts: Those that ranked as many items as there are experts.
        num_tokens: T.
        stated_k: Numbers that the router declares as K; if no observed selection matches, its real forward checks it.
        biases: Names of followed tensors that may be the model's own bias; a ranking to which one was added selects.
    """
    whole = [each for each in _whole(rankings, num_tokens) if each in of_experts and not each.hard]
    # The ids of others go to a loss or a log.
    whole = [each for each in whole if each.returned] or whole
    for kinds in _KINDS:
        chosen = [each for each in whole if each.call.kind in kinds and _selects(each, whole[-1])]
        if chosen:
            biased = [each for each in chosen if each.added & set(biases)]
            return _decide(rankings, biased or chosen, num_tokens, stated_k, biases)
    return None


def _decide(
    rankings: Sequence[Ranking],
    chosen: list[Ranking],
    num_tokens: int,
    stated_k: Collection[int],
    biases: Collection[str],
) -> Decision | NoStyle:
    ranking = chosen[-1]
    num_experts, kind = ranking.call.num_items, ranking.call.kind
    chosen = [each for each in chosen if each.call.num_items == num_experts]
    picks = {id(each.call.scores): each for each in chosen}
    later = {each.number for each in picks.values() if each.after & {other.number for other in chosen}}
    if later:
        in_rounds = len(later) == len(picks) - 1 and len(picks) == len(chosen)
        if not in_rounds or any(each.k != 1 for each in chosen):
            return NoStyle(f"selects experts by {len(chosen)} calls of {kind}, one after another", True)
        top_k, use = len(chosen), Use(k=1, rounds=len(chosen))
        return _planned(rankings, chosen, biases, top_k, use)
    matches = not stated_k or {each.k for each in chosen} & set(stated_k)
    top_k = ranking.k if matches else next(iter(stated_k))
    alike = [each for each in rankings if each.call.kind == kind and not each.hard]
    again = _whole([each for each in alike if each.call.num_items == num_experts], num_tokens)
    only = ranking.call.k if len(again) > 1 else top_k if top_k != ranking.k else None
    if all(_is_whole(each, num_tokens) for each in chosen):
        return _planned(rankings, chosen[-1:], biases, top_k, Use(k=only))
    if any(_is_whole(each, num_tokens) for each in again):
        return NoStyle("ranks its experts for parts of the tokens, and for all of them once more", True)
    return Decision(ranking, top_k, ranking.use._replace(k=only), Plan(certain=ranking.ended))


def _planned(
    rankings: Sequence[Ranking], selecting: Sequence[Ranking], biases: Collection[str], top_k: int, use: Use
) -> Decision | NoStyle:
    planned = plan_of(rankings, selecting, biases)
    if isinstance(planned, NoStyle):
        return planned
    ranking, plan = planned
    if use.rounds == 1:
        use = ranking.use._replace(k=use.k)
    return Decision(ranking, top_k, use, plan)


def _whole(rankings: Sequence[Ranking], num_tokens: int) -> list[Ranking]:
    """Return the rankings of all tokens, and the last of each group that together ranks all tokens."""
    found, parts = [], {}
    for ranking in rankings:
        if _is_whole(ranking, num_tokens):
            found.append(ranking)
        else:
            parts.setdefault((ranking.call.kind, ranking.call.num_items, ranking.k), []).append(ranking)
    for (_, size, _), group in parts.items():
        if sum(part.call.scores.numel() for part in group) == num_tokens * size:
            found.append(group[-1])
    return found


def _is_whole(ranking: Ranking, num_tokens: int) -> bool:
    return ranking.call.scores.numel() == num_tokens * ranking.call.num_items


def _selects(ranking: Ranking, last: Ranking) -> bool:
    """Return whether the ranking's ids were used. If the run broke off, those of the last may be used later."""
    may_be = ranking is last and not (ranking.ended or ranking.compared or ranking.shifts)
    return ranking.k > 0 and (ranking.ids_used or may_be)
