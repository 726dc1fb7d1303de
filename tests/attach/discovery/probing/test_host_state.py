"""What the code of a host can change is restored, wherever it is, and nothing else is touched."""

from __future__ import annotations

import sys
from collections import OrderedDict, defaultdict, deque
from dataclasses import dataclass
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch import nn

from moe_plugin.attach.discovery.probing.host_state import HostState


class Slotted:
    __slots__ = ("count", "late", "seen")

    def __init__(self):
        self.count, self.seen = 0, []


class Ordered(OrderedDict):
    """Refuses to be filled, as transformers' model outputs do."""

    def __setitem__(self, key, value):
        if key == "new":
            raise KeyError(key)
        super().__setitem__(key, value)


@dataclass
class Shared:
    entries: dict


class Meta(type):
    made = []  # noqa: RUF012  a registry

    def __call__(cls):
        Meta.made.append(cls)
        return super().__call__()


class Registered(metaclass=Meta):
    pass


class Host(nn.Module):
    def __init__(self):
        super().__init__()
        self.nested = [[1, 2], {"a": deque([1, 2], maxlen=3)}]
        self.sets = {"open": {1, 2}}
        self.counts = defaultdict(list, {"a": [1]})
        self.ordered = Ordered(a=1, b=2, c=3)
        self.names = SimpleNamespace(by_layer={0: "a"})
        self.slotted = Slotted()
        self.shared = (Shared({"a": 1}),)
        self.registered = Registered()
        self.method = self.names.by_layer.get
        self.register_buffer("load", torch.zeros(2))

    def changed_by(self, change):
        state = HostState(self)
        change(self)
        state.restore_()
        return self


CHANGES = {
    "list in a list": lambda host: host.nested[0].append(3),
    "deque": lambda host: host.nested[1]["a"].extend([3, 4]),
    "set": lambda host: host.sets["open"].add(3),
    "defaultdict": lambda host: host.counts["new"].append(1),
    "order": lambda host: host.ordered.move_to_end("a"),
    "namespace": lambda host: host.names.by_layer.update({1: "b"}),
    "slot": lambda host: setattr(host.slotted, "count", 5),
    "empty slot": lambda host: setattr(host.slotted, "late", 5),
    "list in a slot": lambda host: host.slotted.seen.append(1),
    "object in a tuple": lambda host: host.shared[0].entries.clear(),
    "new attribute": lambda host: setattr(host, "new", 1),
    "removed attribute": lambda host: delattr(host, "sets"),
    "buffer": lambda host: setattr(host, "load", torch.ones(2)),
    "metaclass": lambda host: Registered(),
}


def seen_in(value):
    """Describe a value and all that it holds by text."""
    if isinstance(value, dict):
        return [type(value).__name__, *((repr(key), seen_in(each)) for key, each in value.items())]
    if isinstance(value, (list, tuple, set, deque)):
        return [type(value).__name__, *map(seen_in, value)]
    if isinstance(value, Slotted):
        return [(name, seen_in(getattr(value, name, None))) for name in Slotted.__slots__]
    if isinstance(value, (nn.Module, SimpleNamespace, Shared)):
        return seen_in(vars(value))
    return repr(value)


def everything(host):
    return seen_in(host), seen_in(Meta.made)


class TestHostState:
    @pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
    def test_change_is_undone(self, change):
        host = Host()
        before = everything(host)
        state = HostState(host)
        change(host)
        assert everything(host) != before
        state.restore_()
        assert everything(host) == before

    def test_restored_twice_undoes_each_change(self):
        host = Host()
        state = HostState(host)
        for _ in range(2):
            host.nested[0].append(3)
            state.restore_()
            assert host.nested[0] == [1, 2]

    def test_containers_stay_the_same_objects(self):
        host = Host()
        inner = host.nested[0]
        host.changed_by(lambda host: setattr(host, "nested", []))
        assert host.nested[0] is inner

    def test_module_imported_by_the_host_stays_in_its_package(self):
        package, part = ModuleType("hostpackage"), ModuleType("hostpackage.part")
        code = """
from torch import nn
SEEN = []
class Layer(nn.Module):
    def forward(self, x):
        SEEN.append(x)
"""
        exec(code, vars(package))
        layer = package.Layer()
        state = HostState(layer)
        layer(1)
        package.part = part
        package.other = 1
        state.restore_()
        assert package.SEEN == []
        assert package.part is part
        assert not hasattr(package, "other")

    def test_global_of_another_file_is_found_by_an_import_inside_a_function(self, monkeypatch):
        ledger = ModuleType("ledger")
        ledger.ENTRIES = []
        monkeypatch.setitem(sys.modules, "ledger", ledger)

        class Layer(nn.Module):
            def forward(self, x):
                import ledger

                ledger.ENTRIES.append(x)

        layer = Layer()
        state = HostState(layer)
        layer(1)
        assert ledger.ENTRIES == [1]
        state.restore_()
        assert ledger.ENTRIES == []

    def test_huge_list_of_numbers_is_cut_to_its_length(self):
        host = Host()
        host.vocabulary = list(range(10_000))
        host.changed_by(lambda host: host.vocabulary.append(1))
        assert host.vocabulary == list(range(10_000))

    def test_module_that_holds_what_holds_it_is_saved_once(self):
        host = Host()
        host.nested.append(host)
        host.changed_by(lambda host: host.nested.clear())
        assert host.nested[-1] is host

    def test_torch_keeps_its_state(self):
        linear = nn.Linear(2, 2)
        state = HostState(linear)
        torch.set_num_threads(before := torch.get_num_threads())
        linear.weight.data.fill_(1.0)
        state.restore_()
        assert torch.get_num_threads() == before
        assert (linear.weight == 1).all()
