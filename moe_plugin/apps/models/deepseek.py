"""DeepSeek-V3 at its published size, for counting."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from moe_plugin.errors import ConfigError
from moe_plugin.extras import require


def deepseek_v3(**sizes: Any) -> nn.Module:
    """Return Hugging Face transformers' DeepSeek-V3 on the meta device: shapes without memory.

    Args:
        **sizes: Keys of transformers' `DeepseekV3Config`, whose defaults are the published sizes.

    Raises:
        ConfigError: transformers is not installed, or a key is unknown to it.
    """
    require("transformers", "model")
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    unknown = sorted(set(sizes) - set(DeepseekV3Config().to_dict()))
    if unknown:
        raise ConfigError("model", "must have keys of transformers' DeepseekV3Config only", unknown)
    with torch.device("meta"):
        return DeepseekV3ForCausalLM(DeepseekV3Config(**sizes))
