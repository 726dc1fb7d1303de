"""Routers whose output doesn't hold scores, weights and ids: their routing, computed anew from unbiased scores.

Each function takes the router, its input, its output and its bias, asserts that the output is what the biased choice
with unbiased gate weights gives, and returns the name of the function of the scores. None: there is no such check.

Shape legend: T tokens, D model width, E experts, K selected per token, N keys, S shared experts or sequence.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear, one_hot


def explained(router: Any, x: Tensor, output: Any, bias_E: Tensor) -> str | None:
    """Compare an odd router's output with an independent computation; None for routers of another kind."""
    check = _ODD.get(type(router).__name__)
    return None if check is None else check(router, x.reshape(-1, x.shape[-1]), output, bias_E)


def _dbrx(router: Any, x_TD: Tensor, output: Tensor, bias_E: Tensor) -> str:
    scores_TE = router.router(x_TD).softmax(-1)
    weights_TK, ids_TK = _chosen(scores_TE, bias_E, router.top_k)
    weights_TK = weights_TK / weights_TK.abs().sum(-1, keepdim=True)
    expected = router.experts(x_TD.view(output.shape), ids_TK, weights_TK)
    torch.testing.assert_close(output, expected)
    return "softmax"


def _doge(router: Any, x_TD: Tensor, output: tuple, bias_E: Tensor) -> str:
    halves_2TN = linear(x_TD, router.router_gate.weight).view(2, len(x_TD), -1)
    scores_TE = (halves_2TN[0, :, :, None] + halves_2TN[1, :, None, :]).flatten(1)
    chosen_TK, ids_TK = _chosen(scores_TE, bias_E, router.top_k)
    weights_TK = chosen_TK.softmax(-1)
    dense_TD = router.down_proj(router.act_fn(router.gate_proj(x_TD)) * router.up_proj(x_TD))
    for token, (weights_K, ids_K) in enumerate(zip(weights_TK, ids_TK, strict=True)):
        for weight, expert in zip(weights_K, ids_K, strict=True):
            height = router.act_fn(router.down_embed.weight[expert] @ x_TD[token])
            dense_TD[token] += weight * height * router.up_embed.weight[expert]
    torch.testing.assert_close(output[0].reshape(dense_TD.shape), dense_TD)
    return "softmax of the chosen"


def _inkling(router: Any, x_TD: Tensor, output: tuple, bias_E: Tensor) -> str:
    scores_TE = linear(x_TD, router.weight).sigmoid()
    routed_TE, shared_TS = scores_TE[:, : len(bias_E)], scores_TE[:, len(bias_E) :]
    chosen_TK, ids_TK = _chosen(routed_TE, bias_E, router.top_k)
    total_T1 = chosen_TK.sum(-1, keepdim=True) + shared_TS.sum(-1, keepdim=True)
    expected_TE = torch.zeros_like(routed_TE).scatter(1, ids_TK, chosen_TK / total_T1 * router.route_scale)
    _, weights_TK, ids_TK, _ = output
    torch.testing.assert_close(torch.zeros_like(routed_TE).scatter(1, ids_TK, weights_TK), expected_TE)
    return "sigmoid"


def _jetmoe(router: Any, x_TD: Tensor, output: tuple, bias_E: Tensor) -> str:
    order, _, gates, sizes, _ = output
    scores_TE = linear(x_TD, router.layer.weight)
    chosen_TK, ids_TK = _chosen(scores_TE, bias_E, router.top_k)
    torch.testing.assert_close(gates, chosen_TK.softmax(-1).flatten()[order])
    assert sizes == [int((ids_TK == expert).sum()) for expert in range(len(bias_E))]
    return "softmax of the chosen"


def _llama4(router: Any, x_TD: Tensor, output: tuple, bias_E: Tensor) -> str:
    scores_TE = linear(x_TD, router.weight)
    chosen_TK, ids_TK = _chosen(scores_TE, bias_E, router.top_k)
    torch.testing.assert_close(output[0], torch.zeros_like(scores_TE).scatter(1, ids_TK, chosen_TK.sigmoid()))
    return "sigmoid"


def _nllb(router: Any, x_TD: Tensor, output: tuple, bias_E: Tensor) -> str:
    probabilities_TE = linear(x_TD, router.classifier.weight, router.classifier.bias).softmax(-1)
    chosen_TK, ids_TK = _chosen(probabilities_TE, bias_E, 2)
    gates_TK = output[1].gather(1, ids_TK)
    kept_TK = gates_TK > 0  # beyond an expert's capacity, and for padding, the weight is zero
    assert output[1].count_nonzero() == kept_TK.sum()
    both_T = kept_TK.all(-1)
    assert both_T.any(), "no token to compare"
    torch.testing.assert_close(gates_TK[both_T], (chosen_TK / chosen_TK.sum(-1, keepdim=True))[both_T])
    return "softmax"


def _phimoe(router: Any, x_TD: Tensor, output: tuple, bias_E: Tensor) -> str:
    scores_TE = linear(x_TD, router.weight)
    _, weights_TK, ids_TK = output
    open_TE = torch.ones_like(scores_TE, dtype=torch.bool)
    for ids_T1, weights_T1 in zip(ids_TK.split(1, dim=1), weights_TK.split(1, dim=1), strict=True):
        likeliest_T1 = (scores_TE + bias_E).masked_fill(~open_TE, -torch.inf).argmax(-1, keepdim=True)
        best_T1 = scores_TE.gather(1, likeliest_T1)
        far_TE = (best_T1 - scores_TE) / scores_TE.abs().maximum(best_T1) > 2 * router.router_jitter_noise
        weights_TE = scores_TE.masked_fill(~open_TE | far_TE, -torch.inf).softmax(-1)
        expected_T1 = weights_TE.gather(1, ids_T1)
        if router.training:  # experts are drawn then, and most of the unlikely ones weigh a third
            assert expected_T1.all()
            is_third_T1 = (weights_T1 < expected_T1 / 2) & (expected_T1 < weights_TE.amax(-1, keepdim=True))
            expected_T1 = torch.where(is_third_T1, expected_T1 * 0.3333, expected_T1)
        else:
            assert torch.equal(ids_T1, likeliest_T1)
        torch.testing.assert_close(weights_T1, expected_T1)
        open_TE = open_TE.scatter(1, ids_T1, False)
    return "softmax of those near the best"


def _switch(router: Any, x_TD: Tensor, output: tuple, bias_E: Tensor) -> str:
    probabilities_TE = linear(x_TD, router.classifier.weight).softmax(-1)
    chosen_T1, ids_T1 = _chosen(probabilities_TE, bias_E, 1)
    torch.testing.assert_close(output[1].reshape(-1, 1), chosen_T1)
    chosen_BSE = one_hot(ids_T1[:, 0], len(bias_E)).view(output[0].shape)
    places_BSE = chosen_BSE.cumsum(1)  # of each token in its expert's buffer for the sequence
    assert torch.equal(output[0], chosen_BSE * (places_BSE <= router.expert_capacity))
    return "softmax"


def _chosen(scores_TE: Tensor, bias_E: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return unbiased scores and ids of the ``k`` experts with the largest biased scores."""
    ids_TK = (scores_TE + bias_E).argsort(-1, descending=True)[:, :k]
    return scores_TE.gather(1, ids_TK), ids_TK


_ODD: dict[str, Callable[[Any, Tensor, Any, Tensor], str | None]] = {
    "DbrxFFN": _dbrx,
    "DogeCDMoE": _doge,
    "InklingTopkRouter": _inkling,
    "JetMoeTopKGating": _jetmoe,
    "Llama4Router": _llama4,
    "NllbMoeTop2Router": _nllb,
    "PhimoeTopKRouter": _phimoe,
    "SwitchTransformersTop1Router": _switch,
}
