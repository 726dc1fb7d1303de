from __future__ import annotations

import pytest
import torch

from moe_plugin.balance import balance_
from tests.models.small_models import language_model, token_batch


class TestCompiledModel:
    # Dynamo itself does that.
    @pytest.mark.filterwarnings("ignore:.*Function'> should not be instantiated.*:DeprecationWarning")
    # In fp32 grouped_mm cannot be traced, and a graph ends at the experts: see moe_plugin/experts/matmul.py.
    def test_bf16_is_one_graph_that_stays_while_loads_and_biases_change(self) -> None:
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
                with torch.autocast("cpu", torch.bfloat16):
                    logits_BSV, _ = compiled(tokens)
                logits_BSV.float().square().mean().backward()
                loads.append(torch.cat(list(balanced.update().counts.values())))
        assert len({tuple(load.tolist()) for load in loads}) == 3, "the loads must change"
        assert all(load.sum() == 2 * 2 * tokens.numel() for load in loads)
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
        assert not torch._dynamo.utils.counters["graph_break"]
