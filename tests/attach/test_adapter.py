from __future__ import annotations

import copy
import importlib
import pickle
import pkgutil
from pathlib import Path

import pytest
import torch
from torch import nn

from moe_plugin.attach import families
from moe_plugin.attach.adapter import Adapter
from moe_plugin.attach.balance import balance_
from moe_plugin.attach.balanced_model import find_balanced
from moe_plugin.balancing.rules import Sign
from moe_plugin.errors import AttachError, ConfigError


class OddBlock(nn.Module):
    """Picks its experts one by one in a loop, each among those that are left: no single call ranks them."""

    def __init__(self):
        super().__init__()
        self.n, self.k = 5, 2
        self.gate = nn.Linear(8, 5, bias=False)
        self.experts = nn.ModuleList(nn.Linear(8, 8) for _ in range(5))

    def choose(self, x_TD):
        scores_TE = self.gate(x_TD).softmax(-1)
        left_TE, ids = scores_TE, []
        for _ in range(self.k):
            ids.append((left_TE == left_TE.amax(-1, keepdim=True)).float().argsort(-1)[:, -1:])
            left_TE = left_TE.scatter(-1, ids[-1], -1.0)
        ids_TK = torch.cat(ids, -1)
        return scores_TE.gather(-1, ids_TK), ids_TK

    def forward(self, x_TD):
        weights_TK, ids_TK = self.choose(x_TD)
        gates_TE = torch.zeros(len(x_TD), self.n).scatter(1, ids_TK, weights_TK)
        return torch.stack([e(x_TD) for e in self.experts], -1).mul(gates_TE[:, None]).sum(-1)


def route(block, select, x_TD):
    return select(block.gate(x_TD).softmax(-1), block.k)


ADAPTER = Adapter(block=OddBlock, method="choose", route=route, num_experts="n", top_k="k")


@pytest.fixture
def model():
    torch.manual_seed(0)
    return nn.Sequential(OddBlock(), OddBlock())


class TestAdapter:
    def test_without_one_the_block_is_an_error_that_asks_for_one(self, model):
        with pytest.raises(AttachError, match=r"'0': OddBlock holds experts.* Write an Adapter"):
            balance_(model)

    def test_zero_bias_gives_the_same_output_and_gradients(self, model):
        untouched, x_TD = copy.deepcopy(model), torch.randn(20, 8)
        balance_(model, adapters=[ADAPTER])
        for each in (model, untouched):
            each(x_TD).square().sum().backward()
        torch.testing.assert_close(model(x_TD), untouched(x_TD))
        torch.testing.assert_close(model[0].gate.weight.grad, untouched[0].gate.weight.grad)

    def test_bias_steers_and_tokens_are_counted(self, model):
        balanced = balance_(model, Sign(rate=0.1), adapters=[ADAPTER])
        site, x_TD = balanced["0"], torch.randn(20, 8)
        site.bias[3] = 5.0
        weights_TK, ids_TK = model[0].choose(x_TD)
        assert ids_TK[:, 0].tolist() == [3] * 20
        torch.testing.assert_close(weights_TK[:, 0], model[0].gate(x_TD).softmax(-1)[:, 3])
        assert site.counts.sum() == 40
        model(x_TD)
        before_E = site.bias.clone()
        balanced.update()
        assert site.bias[3] < before_E[3]

    def test_copies_and_pickles_steer_alike(self, model):
        balance_(model, adapters=[ADAPTER])["0"].bias[3] = 5.0
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            other(torch.randn(20, 8))
            balanced = find_balanced(other)
            assert balanced is not None
            assert balanced["0"].counts[3] == 20
            assert other[0].choose.module is other[0]

    def test_remove_gives_the_method_back(self, model):
        before = set(vars(model[0]))
        balance_(model, adapters=[ADAPTER]).remove()
        assert set(vars(model[0])) == before

    @pytest.mark.parametrize("block", ["OddBlock", OddBlock, lambda module: hasattr(module, "choose")])
    def test_block_may_be_a_class_its_name_or_a_predicate(self, model, block):
        adapter = Adapter(block=block, method="choose", route=route, num_experts=5, top_k=2)
        assert list(balance_(model, adapters=[adapter])) == ["0", "1"]

    def test_refusal_names_the_module_and_the_reason(self, model):
        with pytest.raises(AttachError, match="'0': OddBlock is odd; '1': OddBlock is odd"):
            balance_(model, adapters=[Adapter(block=OddBlock, refused="is odd")])

    def test_refused_beside_balanced_is_left_out_and_told(self, model, caplog):
        adapters = [Adapter(block=lambda module: module is model[1], refused="is odd"), ADAPTER]
        balanced = balance_(model, adapters=adapters)
        assert list(balanced) == ["0"]
        assert balanced.refused == {"1": "OddBlock is odd"}
        assert "Not balanced: 1, OddBlock is odd." in caplog.text

    def test_number_that_leads_nowhere_is_an_error(self, model):
        message = "'num_experts' must be an integer or name one: OddBlock has None there, got 'size'"
        with pytest.raises(ConfigError, match=message):
            balance_(model, adapters=[Adapter(block=OddBlock, route=route, num_experts="size")])

    @pytest.mark.parametrize("given", [{}, {"route": route, "refused": "is odd"}])
    def test_neither_or_both_of_route_and_refusal_is_an_error(self, given):
        refused = given.get("refused", "")
        message = rf"'route' must be given if and only if 'refused' is empty \('{refused}'\), got"
        with pytest.raises(ConfigError, match=message):
            Adapter(block=OddBlock, **given)

    def test_our_own_have_the_same_form(self):
        names = {module.name for module in pkgutil.iter_modules(families.__path__)}
        files = [importlib.import_module(f"{families.__name__}.{name}") for name in names]
        assert {"doge", "hash_router", "nllb_moe", "phimoe", "vitpose_backbone"} <= names
        assert all(isinstance(file.ADAPTER, Adapter) for file in files)


class TestDocumentation:
    def test_example_in_the_documentation_runs(self):
        page = (Path(__file__).parents[2] / "docs" / "adapters.md").read_text()
        code = page.split("```python\n")[1].split("```")[0]
        names: dict = {"__name__": "example"}
        exec(compile(code, "docs/adapters.md", "exec"), names)
        assert [counts.sum().item() for counts in names["record"].counts.values()] == [64, 64]
        names["balanced"].remove()
        with pytest.raises(AttachError, match="'0': OddBlock holds experts"):
            balance_(names["model"])
