"""DeepSeek-V3 at its published size, to be counted."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from moe_plugin.errors import ConfigError


def deepseek_v3(**sizes: Any) -> nn.Module:
    """Return Hugging Face transformers' own DeepSeek-V3 on the meta device: shapes without memory.

    Args:
        **sizes: Keys of transformers' `DeepseekV3Config`, of which the defaults are the published geometry.

    Raises:
        ConfigError: transformers is not installed, or a key is unknown to it.
    """
    try:
        from transformers import DeepseekV3Config, DeepseekV3ForCausalLM
    except ImportError as error:
        raise ConfigError(
            "'model' must be one whose packages are installed, got deepseek_v3 without transformers. "
            "Install it with: pip install moe_plugin[hf]"
        ) from error
    unknown = sorted(set(sizes) - set(DeepseekV3Config().to_dict()))
    if unknown:
        raise ConfigError(
            f"'model' must have keys of transformers' DeepseekV3Config, got {', '.join(unknown)}."
        )
    with torch.device("meta"):
        return DeepseekV3ForCausalLM(DeepseekV3Config(**sizes))
