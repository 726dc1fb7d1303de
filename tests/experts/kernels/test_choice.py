from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from moe_plugin import LossFreeBalancing, balance_
from moe_plugin.errors import ConfigError
from moe_plugin.experts import GroupedExperts
from moe_plugin.experts.kernels import choice
from moe_plugin.experts.kernels.choice import TORCH, VARIABLE, check_choice, kernels_for
from tests.stacked_hosts import StackedHost

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


class TestKernelsFor:
    @pytest.mark.parametrize("device", [CPU, CUDA])
    def test_unset_variable_gives_torch(self, monkeypatch: pytest.MonkeyPatch, device: torch.device) -> None:
        monkeypatch.delenv(VARIABLE, raising=False)
        assert kernels_for(device) is TORCH

    def test_triton_is_for_gpus_only(self, monkeypatch: pytest.MonkeyPatch) -> None:
        pytest.importorskip("triton", reason="needs Triton: pip install 'moe_plugin[triton]'")
        monkeypatch.setenv(VARIABLE, "triton")
        assert kernels_for(CPU) is TORCH
        assert [kernel.__module__ for kernel in kernels_for(CUDA)] == [
            "moe_plugin.experts.kernels.permute_triton",
            "moe_plugin.experts.kernels.permute_triton",
        ]


class TestCheckChoice:
    @pytest.mark.parametrize("value", ["torch", None])
    def test_torch_or_nothing_is_allowed(self, monkeypatch: pytest.MonkeyPatch, value: str | None) -> None:
        monkeypatch.delenv(VARIABLE, raising=False)
        if value is not None:
            monkeypatch.setenv(VARIABLE, value)
        check_choice()

    @pytest.mark.parametrize(
        "use",
        [
            lambda: GroupedExperts(2, 4, 4),
            lambda: balance_(StackedHost(), experts="fused"),
            lambda: LossFreeBalancing(experts="fused"),
            lambda: kernels_for(CUDA),
        ],
        ids=["our experts", "fused experts", "callback", "run"],
    )
    def test_unknown_kernels_are_refused_wherever_they_would_run(
        self, monkeypatch: pytest.MonkeyPatch, use: Callable[[], object]
    ) -> None:
        monkeypatch.setenv(VARIABLE, "trition")
        with pytest.raises(
            ConfigError,
            match=r"'MOE_PLUGIN_KERNELS' must be torch or triton, got 'trition'\. Unset it for torch",
        ):
            use()

    def test_unknown_kernels_change_no_model(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv(VARIABLE, "trition")
        model = StackedHost()
        kinds = [type(part) for part in model.modules()]
        with pytest.raises(ConfigError):
            balance_(model, experts="fused")
        assert [type(part) for part in model.modules()] == kinds

    def test_triton_that_is_not_installed_is_refused(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv(VARIABLE, "triton")
        monkeypatch.setattr(choice, "find_spec", lambda name: None)
        message = (
            r"must be torch without Triton, got 'triton'\. Install it: pip install 'moe_plugin\[triton\]'"
        )
        with pytest.raises(ConfigError, match=message):
            check_choice()
