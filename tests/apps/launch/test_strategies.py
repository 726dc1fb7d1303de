from __future__ import annotations

import pytest
import torch
from lightning.pytorch.strategies import FSDPStrategy
from torch import nn

from moe_plugin.apps.launch import strategies
from moe_plugin.apps.launch.strategies import fsdp1, fsdp2, is_unit, mixed_precision
from moe_plugin.errors import ConfigError
from tests.apps.models.small_models import language_model


class TestFsdp2:
    @pytest.mark.parametrize(
        ("devices", "nodes", "tensor_parallel", "expected"), [(2, 1, 1, (2, 1)), (4, 2, 2, (4, 2))]
    )
    def test_processes_are_divided_into_the_two_dimensions(self, devices, nodes, tensor_parallel, expected):
        strategy = fsdp2(devices, nodes, tensor_parallel)
        assert (strategy._data_parallel_size, strategy._tensor_parallel_size) == expected

    @pytest.mark.parametrize(
        ("size", "rule"), [(0, "be an integer >= 1"), (3, r"divide strategy.devices \(4\)")]
    )
    def test_groups_that_do_not_fit_are_named(self, size, rule):
        with pytest.raises(ConfigError, match=rf"^'tensor_parallel_size' must {rule}, got {size}\.$"):
            fsdp2(4, tensor_parallel_size=size)


class TestFsdp1:
    def test_without_a_gpu_it_says_what_to_take(self):
        with pytest.raises(
            ConfigError, match=r"'accelerator' must be a GPU .* got 'cpu'. Set strategy=fsdp."
        ):
            fsdp1("cpu", "32-true")

    def test_buffers_keep_their_precision(self, monkeypatch):
        monkeypatch.setattr(strategies.torch.cuda, "is_available", lambda: True)
        strategy = fsdp1("gpu", "bf16-mixed")
        assert isinstance(strategy, FSDPStrategy)
        assert strategy.mixed_precision_config.param_dtype == torch.bfloat16
        assert strategy.mixed_precision_config.buffer_dtype is None

    @pytest.mark.parametrize(
        ("precision", "dtype"),
        [("bf16-true", torch.bfloat16), ("16-mixed", torch.float16), ("32-true", None)],
    )
    def test_compute_precision_is_the_trainers(self, precision, dtype):
        chosen = mixed_precision(precision)
        assert (chosen and chosen.param_dtype) == dtype

    def test_layers_of_ours_and_of_transformers_are_units(self):
        class QwenDecoderLayer(nn.Linear):
            pass

        model = language_model()
        units = [module for module in model.modules() if is_unit(module, False, 0)]
        assert units == list(model.network.layers)
        assert is_unit(QwenDecoderLayer(1, 1), False, 0)
        assert is_unit(model, True, 0)
