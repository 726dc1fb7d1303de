from __future__ import annotations

import copy
import functools
import importlib
import pickle
import pkgutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from moe_plugin.attach import families
from moe_plugin.attach.adapter import Adapter
from moe_plugin.attach.balance import balance_
from moe_plugin.attach.balanced_model import find_balanced
from moe_plugin.attach.settings import DEFAULT_RULE
from moe_plugin.balancing.rules import Sign
from moe_plugin.errors import AttachError, ConfigError
from moe_plugin.metrics import max_violation
from tests.families.models import build


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


def masked_route(block, select, x_TD):
    """Leave all but the two best experts out, as samplers with a threshold do."""
    scores_TE = block.gate(x_TD)
    left_TE = scores_TE.masked_fill(scores_TE < scores_TE.topk(block.k).values[:, -1:], -torch.inf)
    return select(left_TE, block.k, scores_TE)


class TestSpread:
    """`rate: auto` follows the spread of the router's own scores."""

    def test_it_is_that_of_the_plain_scores(self, model):
        adapter = Adapter(block=OddBlock, method="choose", route=masked_route, num_experts="n", top_k="k")
        balanced, x_TD = balance_(model, adapters=[adapter]), torch.randn(20, 8)
        model[0].choose(x_TD)[0].sum().backward()
        model[1].choose(x_TD)[0].sum().backward()
        balanced.update()
        for name, block in zip(("0", "1"), model, strict=True):
            expected = block.gate(x_TD).std(-1, correction=0).mean()
            spread = balanced.state_dict()["sites"][name]["state"]["score_spread"]
            torch.testing.assert_close(spread, expected, atol=1e-5, rtol=1e-4)

    @pytest.mark.parametrize("jitter", [0.01, 0.0])
    def test_default_rule_balances_a_router_that_samples_from_masked_scores(self, jitter):
        control, balanced = (phimoe_violation(rule, jitter) for rule in (None, DEFAULT_RULE))
        assert control > 1
        assert balanced < control / 3


def phimoe_violation(rule, jitter):
    """MaxVio of the last 20 of 100 steps."""
    block = build("phimoe").model.layers[0].mlp
    block.router.router_jitter_noise = jitter
    balanced = balance_(block, rule)
    optimizer = torch.optim.SGD(block.parameters(), lr=1e-3)
    torch.manual_seed(1)
    counts = []
    for _ in range(100):
        block(torch.randn(2, 24, 64) + 0.5).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        counts.extend(balanced.update().counts.values())
    return max_violation(torch.stack(counts[-20:]).sum(0)).item()


def wrap_(module, name, keep):
    """Hook a module as accelerate does: its own callable in the method's place, and the method in ``keep``."""
    setattr(module, keep, getattr(module, name))

    def hooked(module, *args):
        module.calls = getattr(module, "calls", 0) + 1
        return getattr(module, keep)(*args)

    setattr(module, name, functools.partial(hooked, module))


def accelerate_(module, name, keep):
    hooks = pytest.importorskip("accelerate.hooks")
    assert (name, keep) == ("forward", "_old_forward")

    class Calls(hooks.ModelHook):
        def pre_forward(self, module, *args, **kwargs):
            module.calls = getattr(module, "calls", 0) + 1
            return args, kwargs

    hooks.add_hook_to_module(module, Calls())


class ForwardBlock(OddBlock):
    """Its forward is its routing."""

    def forward(self, x_TD):
        return self.choose(x_TD)


FORWARD = Adapter(block=ForwardBlock, route=route, num_experts="n", top_k="k")
HOOKS = [
    pytest.param(wrap_, ADAPTER, "_kept", id="hand-written"),
    pytest.param(wrap_, FORWARD, "_old_forward", id="hand-written-forward"),
    pytest.param(accelerate_, FORWARD, "_old_forward", id="accelerate"),
]


@pytest.mark.parametrize(("hook_", "adapter", "keep"), HOOKS)
class TestInstanceMethod:
    """A block whose method other libraries have replaced on the instance."""

    def block(self) -> Any:
        torch.manual_seed(0)
        return ForwardBlock()

    def test_hook_and_route_run_both(self, hook_, adapter, keep):
        block = self.block()
        hook_(block, adapter.method, keep)
        balanced = balance_(block, adapters=[adapter])
        balanced[""].bias[3] = 5.0
        for steered in (block, copy.deepcopy(block)):
            assert getattr(steered, adapter.method)(torch.randn(20, 8))[1][:, 0].tolist() == [3] * 20
            assert steered.calls == 1
            counted = find_balanced(steered)
            assert counted is not None
            assert counted[""].counts.sum() == 40
            steered.calls = 0

    def test_remove_gives_back_the_same_objects(self, hook_, adapter, keep):
        block = self.block()
        hook_(block, adapter.method, keep)
        before = dict(vars(block))
        balance_(block, adapters=[adapter]).remove()
        assert vars(block).keys() == before.keys()
        assert all(vars(block)[name] is value for name, value in before.items())

    def test_hook_set_while_balanced_survives_remove(self, hook_, adapter, keep):
        block, x_TD = self.block(), torch.randn(20, 8)
        expected = block.choose(x_TD)
        balanced = balance_(block, adapters=[adapter])
        hook_(block, adapter.method, keep)
        getattr(block, adapter.method)(x_TD)
        assert balanced[""].counts.sum() == 40
        balanced.remove()
        torch.testing.assert_close(getattr(block, adapter.method)(x_TD), expected)
        assert block.calls == 2

    def test_hook_taken_off_while_balanced_leaves_it_balanced(self, hook_, adapter, keep):
        block = self.block()
        hook_(block, adapter.method, keep)
        original = getattr(block, keep)
        balanced = balance_(block, adapters=[adapter])
        setattr(block, adapter.method, getattr(block, keep))
        delattr(block, keep)
        getattr(block, adapter.method)(torch.randn(20, 8))
        assert balanced[""].counts.sum() == 40
        balanced.remove()
        assert vars(block)[adapter.method] is original


class TestHiddenMethod:
    @pytest.mark.parametrize("hide", ["closure", "another"])
    def test_method_that_no_attribute_holds_is_an_error_and_nothing_changes(self, model, hide):
        method = model[1].choose
        model[1].choose = (lambda x_TD: method(x_TD)) if hide == "closure" else model[0].choose
        before = [dict(vars(module)) for module in model]
        with pytest.raises(AttachError, match=r"'1': something else is in the place of OddBlock\.choose"):
            balance_(model, adapters=[ADAPTER])
        assert [dict(vars(module)) for module in model] == before
        assert list(balance_(model, adapters=[ADAPTER], sites="0")) == ["0"]
