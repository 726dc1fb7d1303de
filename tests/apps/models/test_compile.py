from __future__ import annotations

import pytest
import torch

from moe_plugin.attach.balance import balance_
from tests.apps.models.small_models import language_model, token_batch


class TestCompiledModel:
    # Dynamo itself does that.
    @pytest.mark.filterwarnings("ignore:.*Function'> should not be instantiated.*:DeprecationWarning")
    @pytest.mark.parametrize("autocasts", [False, True], ids=["fp32", "bf16"])
    def test_is_one_graph_that_stays_while_loads_and_biases_change(self, autocasts: bool) -> None:
        torch.manual_seed(0)
        model = language_model()
        balanced = balance_(model)
        torch.compiler.reset()
        torch._dynamo.utils.counters.clear()
        compiled = torch.compile(model.network, fullgraph=True, backend="aot_eager")
        loads = []
        with torch._dynamo.config.patch(error_on_recompile=True):
            for _ in range(3):
                tokens = token_batch(3)["tokens"][:, :-1]
                with torch.autocast("cpu", torch.bfloat16, enabled=autocasts):
                    logits_BSV, _ = compiled(tokens)
                logits_BSV.float().square().mean().backward()
                loads.append(torch.cat(list(balanced.update().counts.values())))
        assert len({tuple(load.tolist()) for load in loads}) == 3, "the loads must change"
        assert all(load.sum() == 2 * 2 * tokens.numel() for load in loads)
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
        assert not torch._dynamo.utils.counters["graph_break"]

    @pytest.mark.filterwarnings("ignore:.*Function'> should not be instantiated.*:DeprecationWarning")
    @pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")  # torch's own, while compiling
    def test_layers_compiled_before_they_are_balanced_are_looked_at_as_written(self) -> None:
        torch.manual_seed(0)
        model = language_model()
        torch.compiler.reset()
        torch._dynamo.utils.counters.clear()
        for layer in model.network.layers:
            layer.compile(fullgraph=True, backend="aot_eager")
        balanced = balance_(model)
        assert not torch._dynamo.utils.counters["stats"], "nothing may be compiled for fake inputs"
        batch = token_batch(2)
        model._losses(batch)[0].backward()
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
        assert [site.counts.sum() for site in balanced.values()] == [2 * batch["tokens"][:, 1:].numel()] * 2
