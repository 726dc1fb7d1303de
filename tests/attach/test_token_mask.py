"""Padding, as models of models are told of it.

Shape legend: B batch, S sequence, D model width.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn

from moe_plugin.attach.balance import balance_
from moe_plugin.errors import EffectError
from tests.hosts import Block, Host, SoftmaxRouter


def moe():
    return Block(SoftmaxRouter(8, 4, 2), 8)


class Stack(nn.Module):
    """An encoder or a decoder, as transformers has them: the same class for both."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([moe()])

    def forward(self, inputs_embeds=None, attention_mask=None, encoder_hidden_states=None):
        x = inputs_embeds
        for layer in self.layers:
            x = layer(x)
        return x


class EncoderDecoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder, self.decoder = Stack(), Stack()

    def forward(
        self, inputs_embeds, attention_mask=None, decoder_inputs_embeds=None, decoder_attention_mask=None
    ):
        encoded = self.encoder(inputs_embeds=inputs_embeds, attention_mask=attention_mask)
        return self.decoder(
            inputs_embeds=decoder_inputs_embeds,
            attention_mask=decoder_attention_mask,
            encoder_hidden_states=encoded,
        )


class Tower(nn.Module):
    def __init__(self):
        super().__init__()
        self.block = moe()

    def forward(self, pixel_values):
        return self.block(pixel_values)


class VisionLanguage(nn.Module):
    """A vision tower beside a language model, which is given a causal mask (B, 1, S, S) made of the mask."""

    def __init__(self, causal=False):
        super().__init__()
        self.visual, self.language_model, self.causal = Tower(), Stack(), causal

    def forward(self, inputs_embeds, attention_mask=None, pixel_values=None):
        x = torch.cat([inputs_embeds[:, :-1], self.visual(pixel_values)[:, :1]], 1)
        mask = attention_mask[:, None, None].expand(-1, 1, x.shape[1], -1) if self.causal else attention_mask
        return self.language_model(inputs_embeds=x, attention_mask=mask)


def mask(padding, batch=2, length=6):
    mask_BS = torch.ones(batch, length, dtype=torch.long)
    mask_BS[-1, length - padding :] = 0
    return mask_BS


def embeds(batch=2, length=6):
    return torch.randn(batch, length, 8)


def counted(balanced):
    tokens = [site.counts.sum().item() // 2 for site in balanced.values()]
    balanced.discard_counts_()
    return tokens


class TestEncoderDecoder:
    def test_each_side_goes_by_its_own_mask(self):
        model = EncoderDecoder()
        balanced = balance_(model)
        model(embeds(), mask(2), embeds(length=5), mask(1, length=5))
        assert counted(balanced) == [10, 9]

    def test_decoder_without_a_mask_counts_all(self):
        model = EncoderDecoder()
        balanced = balance_(model)
        model(embeds(), mask(2), embeds(length=6))
        assert counted(balanced) == [10, 12]

    def test_inner_model_called_alone_goes_by_its_mask(self):
        model = EncoderDecoder()
        balanced = balance_(model)
        model.decoder(inputs_embeds=embeds(), attention_mask=mask(3))
        assert counted(balanced) == [0, 9]


class TestVisionLanguage:
    @pytest.mark.parametrize("causal", [False, True])
    @pytest.mark.parametrize("patches", [3, 6, 50])
    def test_tower_counts_all_and_text_goes_by_the_mask(self, causal, patches):
        model = VisionLanguage(causal)
        balanced = balance_(model)
        model(embeds(), mask(2), pixel_values=embeds(length=patches))
        assert counted(balanced) == [2 * patches, 10]


class TestForms:
    @pytest.mark.parametrize(
        "form", [torch.ones(2, 1, 6, 6), {"full_attention": torch.ones(2, 1, 6, 6)}, None]
    )
    def test_other_forms_of_mask_count_all(self, form):
        model = Host()
        balanced = balance_(model)
        model(torch.zeros(2, 6, dtype=torch.long), attention_mask=form)
        assert counted(balanced) == [12, 12]

    @pytest.mark.parametrize("dtype", [torch.bool, torch.float32, torch.int32])
    def test_any_dtype_marks_tokens(self, dtype):
        model = Host()
        balanced = balance_(model)
        model(torch.zeros(2, 6, dtype=torch.long), mask(2).to(dtype))
        assert counted(balanced) == [10, 10]

    def test_router_of_some_tokens_counts_all_of_them(self):
        class Part(nn.Module):
            def __init__(self):
                super().__init__()
                self.block = moe()

            def forward(self, x, attention_mask=None):
                return self.block(x[:, ::2])

        model = Part()
        balanced = balance_(model)
        model(embeds(), attention_mask=mask(3))
        assert counted(balanced) == [6]

    def test_failed_forward_leaves_no_mask_behind(self):
        model = Host()
        balanced = balance_(model)
        with pytest.raises(EffectError):
            model(torch.zeros(2, 9, dtype=torch.long), mask(1))
        balanced.discard_counts_()
        model(torch.zeros(2, 9, dtype=torch.long))
        assert counted(balanced) == [18, 18]
