"""A step on fake tensors against the same step for real, by the allocator's own record."""

from __future__ import annotations

import pytest
import torch

from moe_plugin.apps.plan.buffers import kept_gradients
from moe_plugin.apps.plan.trace import next_token_loss, trace
from moe_plugin.errors import ConfigError
from moe_plugin.experts import ExpertShape
from moe_plugin.experts.kernels import dtypes
from tests.apps.plan.plan_models import on_meta, plan_model, real_bytes


def planned_peak(build, shape, autocast):
    step = trace(on_meta(build), shape, autocast=autocast)
    return int((step.activations_M + kept_gradients(step, {0})).max())


def measured_peak(build, shape, autocast):
    model, tokens_BS = build(), torch.randint(0, 512, shape)

    def step():
        model.zero_grad()
        with torch.autocast("cpu", autocast, enabled=autocast is not None):
            next_token_loss(model, tokens_BS).backward()

    step()
    model.zero_grad()
    return real_bytes(step)[0]


def hugging_face(name, **sizes):
    transformers = pytest.importorskip("transformers")
    config = getattr(transformers, f"{name}Config")
    small = {"vocab_size": 512, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = getattr(transformers, f"{name}ForCausalLM")(config(**small, **sizes))
    model.set_experts_implementation("grouped_mm")
    return model


def mixtral():
    return hugging_face("Mixtral", num_key_value_heads=2, num_local_experts=8, intermediate_size=64)


MODELS = {
    "16 experts": plan_model,
    "64 small experts": lambda: plan_model(experts=ExpertShape(64, 8, 16)),
    "wide": lambda: plan_model(dim=128, num_layers=2, vocab_size=2048),
    "checkpointed": lambda: plan_model(activation_checkpointing="non_reentrant"),
    "checkpointed, reentrant": lambda: plan_model(activation_checkpointing="reentrant"),
    "dense first": lambda: plan_model(num_dense=1, tie_embeddings=True),
    "mixtral": mixtral,
}


class TestTrace:
    @pytest.mark.parametrize("autocast", [None, torch.bfloat16], ids=["fp32", "bf16-mixed"])
    @pytest.mark.parametrize("shape", [(2, 32), (5, 64)], ids=str)
    @pytest.mark.parametrize("name", MODELS)
    def test_peak_is_within_a_tenth_of_the_real_one(self, monkeypatch, name, shape, autocast):
        # A plan is one for machines that compute in half precision, so this one must not do without.
        monkeypatch.setattr(dtypes, "EMULATED_BY_CPU", frozenset())
        planned = planned_peak(MODELS[name], shape, autocast)
        measured = measured_peak(MODELS[name], shape, autocast)
        print(
            f"{name}, {shape}, {autocast}: planned {planned:,}, measured {measured:,}: {planned / measured:.3f}"
        )
        assert planned == pytest.approx(measured, rel=0.1)

    def test_experts_that_loop_over_those_hit_are_refused(self):
        def eager():
            model = mixtral()
            model.set_experts_implementation("eager")
            return model

        with pytest.raises(ConfigError, match="grouped_mm"):
            trace(on_meta(eager), (2, 16))

    def test_units_are_marked_in_the_order_they_run(self):
        model = on_meta(plan_model)
        step = trace(model, (2, 16), [model, *model.network.layers])
        kinds = [(mark.kind, mark.unit) for mark in step.marks if mark.kind != "gradient"]
        forward = [mark for unit in (1, 2, 3) for mark in (("forward", unit), ("forward_end", unit))]
        backward = [mark for unit in (3, 2, 1) for mark in (("backward", unit), ("backward_end", unit))]
        root = [("forward", 0)], [("forward_end", 0), ("backward", 0)], [("backward_end", 0)]
        assert kinds == [*root[0], *forward, *root[1], *backward, *root[2]]

    def test_each_gradient_is_marked_with_its_bytes(self):
        model = on_meta(plan_model)
        expected = sorted(p.numel() * p.element_size() for p in model.parameters())
        assert (
            sorted(mark.size for mark in trace(model, (2, 16)).marks if mark.kind == "gradient") == expected
        )
