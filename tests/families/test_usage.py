"""What users do with transformers models beyond a training step: generate, show images, compile, hook."""

from __future__ import annotations

import copy

import pytest
import torch

pytest.importorskip("transformers")

from moe_plugin.attach.balance import balance_
from moe_plugin.balancing.rules import Sign
from tests.families.inputs import LENGTH, PADDING, inputs_of
from tests.families.models import build


@pytest.mark.filterwarnings("ignore")
class TestGeneration:
    @pytest.mark.parametrize("family", ["mixtral", "deepseek_v3", "qwen3_next"])
    def test_cached_tokens_count_once_and_padding_never(self, family):
        model = build(family).eval()
        balanced = balance_(model)
        inputs = inputs_of(model)
        mask_BS = inputs["attention_mask"].flip(1)  # generation pads on the left
        steps = 4
        model.generate(
            inputs["input_ids"],
            attention_mask=mask_BS,
            max_new_tokens=steps,
            min_new_tokens=steps,
            do_sample=False,
            pad_token_id=1,
        )
        expected = int(mask_BS.sum()) + (steps - 1) * len(mask_BS)
        for site in balanced.values():
            assert site.eval_counts.sum() == expected * site.top_k
            assert site.counts.sum() == 0


@pytest.mark.filterwarnings("ignore")
@pytest.mark.slow
class TestCompile:
    @pytest.mark.parametrize("family", ["mixtral", "deepseek_v3", "gpt_oss", "llama4"])
    def test_routers_compile_whole_and_not_again_when_the_bias_moves(self, family):
        torch._dynamo.reset()
        model = build(family)
        balanced = balance_(model, Sign(rate=0.1))
        site = next(iter(balanced.values()))
        compiled = torch.compile(site.router, fullgraph=True, backend="aot_eager")
        x_TD = torch.randn(20, 64)
        with torch._dynamo.config.patch(error_on_recompile=True):
            for _ in range(3):
                torch.testing.assert_close(compiled(x_TD)[0], copy.deepcopy(site.router)(x_TD)[0])
                balanced.discard_counts_()
                compiled(x_TD)
                assert site.counts.sum() == 20 * site.top_k
                site.bias.add_(torch.randn(site.num_experts))

    @pytest.mark.parametrize("family", ["mixtral", "deepseek_v3"])
    def test_model_compiles_whole_where_its_experts_do(self, family):
        torch._dynamo.reset()
        model = build(family)
        model.set_experts_implementation("batched_mm")
        inputs = inputs_of(model)
        balanced = balance_(model, Sign(rate=0.1))
        model(**inputs)[0].sum().backward()
        balanced.update()
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        with torch._dynamo.config.patch(error_on_recompile=True):
            for _ in range(2):
                compiled(**inputs)[0].sum().backward()
                for site in balanced.values():
                    assert site.counts.sum() == (3 * LENGTH - PADDING) * site.top_k
                balanced.update()

    @pytest.mark.parametrize("family", ["mixtral", "deepseek_v3", "aria"])
    def test_model_compiles_whole_with_fused_experts(self, family):
        torch._dynamo.reset()
        model = build(family)
        inputs = inputs_of(model)
        expected = model(**inputs)[0].detach()
        balanced = balance_(model, Sign(rate=0.1), experts="fused")
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        with torch._dynamo.config.patch(error_on_recompile=True):
            for _ in range(2):
                output = compiled(**inputs)[0]
                torch.testing.assert_close(output, expected, atol=1e-5, rtol=1e-4)
                output.sum().backward()
        balanced.update()


@pytest.mark.filterwarnings("ignore")
class TestLoRA:
    def test_weights_that_are_adapted_in_each_forward_are_computed_with(self):
        peft = pytest.importorskip("peft")
        outputs = {}
        for experts in (None, "fused"):
            torch.manual_seed(0)
            config = peft.LoraConfig(target_parameters=["experts.gate_up_proj", "experts.down_proj"])
            model = peft.get_peft_model(build("mixtral"), config)
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    torch.nn.init.normal_(parameter, std=0.1)
            balanced = balance_(model, experts=experts)
            output = model(**inputs_of(model.base_model.model))[0]
            output.square().mean().backward()
            balanced.update()
            gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
            assert gradients.keys() == {n for n, p in model.named_parameters() if p.requires_grad}
            outputs[experts] = (output.detach(), gradients)
        torch.testing.assert_close(outputs["fused"], outputs[None], atol=1e-5, rtol=1e-3)


@pytest.mark.filterwarnings("ignore")
class TestImages:
    def test_image_tokens_in_the_sequence_count(self):
        model = build("qwen3_vl_moe")
        vision = model.config.vision_config
        balanced = balance_(model)
        inputs = inputs_of(model)
        inputs["input_ids"][:, 1:3] = model.config.image_token_id
        patches = 3 * 2 * vision.spatial_merge_size**2
        width = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
        inputs["pixel_values"] = torch.randn(patches, width)
        inputs["image_grid_thw"] = torch.tensor(
            [[1, vision.spatial_merge_size, 2 * vision.spatial_merge_size]] * 3
        )
        inputs["mm_token_type_ids"] = (inputs["input_ids"] == model.config.image_token_id).int()
        model(**inputs)
        for site in balanced.values():
            assert site.counts.sum() == int(inputs["attention_mask"].sum()) * site.top_k


class TestAccelerate:
    def test_hooks_of_accelerate_leave_balancing_in_place(self):
        hooks = pytest.importorskip("accelerate.hooks")
        model = build("mixtral")
        router = model.model.layers[0].mlp.gate
        hooks.add_hook_to_module(router, hooks.ModelHook())
        hooked = router.forward
        balanced = balance_(model)
        model(**inputs_of(model))
        assert all(site.counts.sum() == (3 * LENGTH - PADDING) * 2 for site in balanced.values())
        balanced.remove()
        assert router.forward is hooked
