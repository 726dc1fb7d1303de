"""Text corpora for language models: sources, tokenizers and a stateful Lightning data module."""

from moe_plugin.apps.data.documents import Document
from moe_plugin.apps.data.files import Files
from moe_plugin.apps.data.hugging_face import HuggingFace
from moe_plugin.apps.data.module import CorpusDataModule
from moe_plugin.apps.data.standard_library import StandardLibrary
from moe_plugin.apps.data.tokenization import BytePairs, Bytes

__all__ = ["BytePairs", "Bytes", "CorpusDataModule", "Document", "Files", "HuggingFace", "StandardLibrary"]
