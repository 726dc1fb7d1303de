"""Small layers of stacked experts, ours and those of transformers, behind one signature."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from moe_plugin.experts import GroupedExperts
from moe_plugin.types import Routing

DIM, HIDDEN, EXPERTS = 8, 12, 8
LAYERS = ("ours", "mixtral", "qwen3_moe", "deepseek_v3", "gpt_oss")
HOSTS = {
    "mixtral": ("Mixtral", {"num_local_experts": EXPERTS, "intermediate_size": HIDDEN}),
    "qwen3_moe": ("Qwen3Moe", {"num_experts": EXPERTS, "moe_intermediate_size": HIDDEN}),
    "deepseek_v3": ("DeepseekV3", {"n_routed_experts": EXPERTS, "moe_intermediate_size": HIDDEN}),
    "gpt_oss": ("GptOss", {"num_local_experts": EXPERTS, "intermediate_size": HIDDEN}),
}


def expert_layer(kind: str, implementation: str = "grouped_mm") -> nn.Module:
    """A layer of 8 experts, with the same weights every time."""
    torch.manual_seed(0)
    if kind == "ours":
        return GroupedExperts(EXPERTS, DIM, HIDDEN)
    from importlib import import_module

    import transformers

    name, sizes = HOSTS[kind]
    config = getattr(transformers, f"{name}Config")(hidden_size=DIM, **sizes)
    config._experts_implementation = implementation
    module = import_module(f"transformers.models.{kind}.modeling_{kind}")
    layer = getattr(module, f"{name}Experts")(config)
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.3)
    return layer


def apply(layer: nn.Module, x_TD: Tensor, expert_ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
    """Calls the layer in its own way."""
    if isinstance(layer, GroupedExperts):
        return layer(x_TD, Routing(weights_TK, expert_ids_TK, scores_TE=weights_TK))
    return layer(x_TD, expert_ids_TK, weights_TK)


def routed_tokens(num_tokens: int, experts: list[int], top_k: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states, ids of `top_k` different experts among the given ones, and gate weights; both need gradients."""
    choice_TK = torch.rand(num_tokens, len(experts)).argsort(-1)[:, :top_k]
    weights_TK = torch.rand(num_tokens, top_k).requires_grad_()
    return torch.randn(num_tokens, DIM).requires_grad_(), torch.tensor(experts)[choice_TK], weights_TK
