"""The mixture-of-experts layer: routed experts, shared experts, and the block that composes them."""

from moe_plugin.experts.block import MoEBlock
from moe_plugin.experts.expert_choice import ExpertChoiceBlock
from moe_plugin.experts.grouped import GroupedExperts
from moe_plugin.experts.linear import Linear
from moe_plugin.experts.parallel import expert_mesh, parallelize_experts_
from moe_plugin.experts.shape import ExpertShape
from moe_plugin.experts.swiglu import SwiGLU
from moe_plugin.experts.zero import ZeroExperts

__all__ = [
    "ExpertChoiceBlock",
    "ExpertShape",
    "GroupedExperts",
    "Linear",
    "MoEBlock",
    "SwiGLU",
    "ZeroExperts",
    "expert_mesh",
    "parallelize_experts_",
]
