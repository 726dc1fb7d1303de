"""All blocks, by name."""

from __future__ import annotations

from tests.strangers import (
    blackmamba,
    colossal,
    davidmrau,
    deepseek_v3,
    deepspeed,
    dit_moe,
    fastmoe,
    grok,
    hunyuan,
    labml,
    llama_moe,
    lucidrains,
    makemoe,
    mc_smoe,
    megablocks,
    megatron,
    minimind,
    mistral,
    nanomoe,
    rasbt,
    st_moe,
    time_moe,
    torchscale,
    tutel,
    unroutable,
)
from tests.strangers.stranger import Stranger

FILES = (
    *(
        rasbt,
        labml,
        davidmrau,
        torchscale,
        deepspeed,
        nanomoe,
        megablocks,
        fastmoe,
        hunyuan,
        mc_smoe,
        llama_moe,
    ),
    *(minimind, deepseek_v3, mistral, makemoe, colossal, tutel, megatron, st_moe, lucidrains, grok, dit_moe),
    *(blackmamba, time_moe, unroutable),
)
BLOCKS: dict[str, Stranger] = {name: block for each in FILES for name, block in each.BLOCKS.items()}
BALANCED = {name: block for name, block in BLOCKS.items() if not block.refused}
REFUSED = {name: block for name, block in BLOCKS.items() if block.refused}
