"""The reference language model, its sizes, and what any model costs."""

from moe_plugin.apps.models.deepseek import deepseek_v3
from moe_plugin.apps.models.hugging_face import HuggingFaceModel
from moe_plugin.apps.models.language_model import LanguageModel
from moe_plugin.apps.models.optimizer import AdamWWarmupCosine
from moe_plugin.apps.models.size import measure, print_size_table, size_table

__all__ = [
    "AdamWWarmupCosine",
    "HuggingFaceModel",
    "LanguageModel",
    "deepseek_v3",
    "measure",
    "print_size_table",
    "size_table",
]
