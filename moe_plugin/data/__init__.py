"""Text corpora for language models: sources, tokenizers and a stateful Lightning data module."""

from __future__ import annotations

from moe_plugin.data.documents import Document, Source
from moe_plugin.data.files import Files
from moe_plugin.data.hugging_face import HuggingFace
from moe_plugin.data.module import CorpusDataModule
from moe_plugin.data.standard_library import StandardLibrary
from moe_plugin.data.tokenization import BytePairs, Bytes, Tokenizer

__all__ = [
    "BytePairs",
    "Bytes",
    "CorpusDataModule",
    "Document",
    "Files",
    "HuggingFace",
    "Source",
    "StandardLibrary",
    "Tokenizer",
]
