"""Routers to draw: what a mixture-of-experts block in public code may be made of, as one flat record.

The steps of these names are in `scoring`, `selecting` and `sides`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from random import Random

from hypothesis import strategies as st

POSITIVE_SCORES = ("softmax", "softmax by hand", "sigmoid", "sqrtsoftplus")
GROUPS = ("groups by zero", "groups by infinity")
TOPK_CALLS = ("torch.topk", "Tensor.topk", "topk of keywords", "topk unsorted")
SORT_CALLS = ("sort", "argsort", "end of sort", "end of argsort", "argsort of negative")
OTHER_ORDER = ("topk unsorted", "end of sort", "end of argsort")
ROUNDS = ("argmax in rounds", "max in rounds", "argmax times zero")
FOR_ONE = ("argmax", "max")
RANDOM = ("multinomial", "gumbel")
UNRANKED = ("threshold", "expert choice", *RANDOM)
SECOND_VALUES = ("values of topk", "values of max")
GATHERED = ("gathered", "gathered from softmax", "gathered from softmax by hand")
WHOLE_GRAPH = "fullgraph"
COMPILED = ("compiled", "compiled by aot", WHOLE_GRAPH)

AXES = {
    "experts": range(2, 17),
    "k": (1, 1, 2, 3, 4),
    "tokens": range(24, 65, 2),
    "width": range(8, 17),
    "blocks": (1, 2),
    "neighbour": (False, True),
    "names": range(4),
    "place": ("module", "block", "registry"),
    "weight": ("linear", "linear with bias", "parameter"),
    "stacked": (False, True),
    "logits": ("plain", "cosine", "noisy", "cooled"),
    "dtype": ("fp32", "bf16", "rounded"),
    "score": ("logits", *POSITIVE_SCORES),
    "choice_bias": (False, True),
    "mask": ("none", "experts", *GROUPS),
    "select": (
        *(*TOPK_CALLS, *SORT_CALLS, *ROUNDS, *FOR_ONE * 4),
        *("argmax of one_hot", "candidates", "candidates", "chunks", "transposed", *UNRANKED),
    ),
    "second": ("none", "switch loss", "logged max", "same again", "load loss", *SECOND_VALUES),
    "early": (False, True),
    "gates": ("values", "softmax", "softmax by hand", "normalised", *GATHERED),
    "combine": ("scatter", "one_hot", "masked", "loop"),
    "look": ("none", "unique", "nonzero", "tolist", "item"),
    "effect": ("none", "manager", "cached tensor", "cached distribution", "calls", "last logits"),
    "mode": ("eager",) * 16 + ("evaluation first", "checkpoint", "reentrant checkpoint") * 2 + COMPILED,
    "seed": range(100),
}
"""The values of each field of `RouterSpec`; those repeated are drawn more often."""
PLAIN_SHARES = (0.3, 0.6, 0.9)
"""Shares of the fields that keep their default, except those that are always drawn."""
ALWAYS_DRAWN = ("experts", "k", "select", "gates", "score")


@dataclass(frozen=True, repr=False)
class RouterSpec:
    """A model to build; shown by what differs from the plainest one.

    Attributes:
        neighbour: Whether the model has a plain block too.
        names: Which names the parts have.
        choice_bias: Whether the host has a bias of its own for the selection.
        second: What ranks the scores again, and for what.
        early: Whether it does so before the selection.
        look: How the code looks at the ids in Python, which breaks the graph of a compiler.
        effect: What is left behind outside of the output.
    """

    experts: int = 4
    k: int = 2
    tokens: int = 24
    width: int = 8
    blocks: int = 1
    neighbour: bool = False
    names: int = 0
    place: str = "module"
    weight: str = "linear"
    stacked: bool = False
    logits: str = "plain"
    dtype: str = "fp32"
    score: str = "softmax"
    choice_bias: bool = False
    mask: str = "none"
    select: str = "torch.topk"
    second: str = "none"
    early: bool = False
    gates: str = "values"
    combine: str = "scatter"
    look: str = "none"
    effect: str = "none"
    mode: str = "eager"
    seed: int = 0

    def __repr__(self) -> str:
        """Return the call that makes it, without defaults."""
        given = {each.name: getattr(self, each.name) for each in fields(self)}
        shown = [f"{name}={value!r}" for name, value in given.items() if value != getattr(RouterSpec, name)]
        return f"RouterSpec({', '.join(shown)})"

    @property
    def is_ranked(self) -> bool:
        """Whether it selects by a ranking of all experts for each token."""
        return self.select not in UNRANKED

    @property
    def is_ordinary(self) -> bool:
        """Whether it must be balanced: a plain ranking, and gate weights from it."""
        plain = ("mask", "second", "look", "effect", "mode")
        return (
            all(getattr(self, name) == getattr(RouterSpec, name) for name in plain)
            and self.select in TOPK_CALLS + SORT_CALLS + FOR_ONE
            and self.gates in ("values", "softmax", "normalised", "gathered")
            and self.place != "registry"
            and self.k < self.experts  # else there is nothing to balance
        )


NONSENSE: tuple[Callable[[RouterSpec], bool], ...] = (
    lambda s: s.k > s.experts,
    lambda s: (
        s.k == s.experts and (s.mask == "experts" or s.select == "candidates" or s.second == "load loss")
    ),
    lambda s: (
        s.k > 1 and (s.select in (*FOR_ONE, "argmax of one_hot", "gumbel") or s.second == "values of max")
    ),
    lambda s: s.mask in GROUPS and (s.experts % 2 == 1 or s.experts == 2 or s.experts < 2 * s.k),
    lambda s: s.mask in GROUPS and s.dtype != "fp32",  # equal groups have no order
    lambda s: s.score not in POSITIVE_SCORES and (s.mask == GROUPS[0] or s.select == "argmax times zero"),
    lambda s: s.score not in POSITIVE_SCORES and s.gates == "normalised" and s.second not in SECOND_VALUES,
    lambda s: s.choice_bias and (s.gates not in GATHERED or s.second in SECOND_VALUES or not s.is_ranked),
    lambda s: s.second in SECOND_VALUES and (s.mask != "none" or s.gates in GATHERED),
    lambda s: s.second in SECOND_VALUES and s.k > 1 and s.select in OTHER_ORDER,
    lambda s: s.weight == "linear with bias" and s.logits == "cosine",
    lambda s: s.early and s.second == "none",
    lambda s: (
        not s.is_ranked and (s.mask, s.second, s.look, s.combine) != ("none", "none", "none", "scatter")
    ),
    lambda s: s.select == "multinomial" and not s.score.startswith("softmax"),
    lambda s: s.select == "gumbel" and s.score != "logits",
    lambda s: (
        s.mode == WHOLE_GRAPH and not (s.look == s.effect == "none" != s.combine != "loop" and s.is_ranked)
    ),
    lambda s: s.mode == WHOLE_GRAPH and s.mask in GROUPS,  # no mode lets dynamo trace Tensor.unflatten
)
"""What no person would write, or torch would not run."""


def makes_sense(spec: RouterSpec) -> bool:
    """Return whether the plain code runs."""
    return not any(is_nonsense(spec) for is_nonsense in NONSENSE)


def drawn(random: Random) -> RouterSpec:
    """Draw a router that makes sense."""
    while True:
        share = random.choice(PLAIN_SHARES)
        names = [name for name in AXES if name in ALWAYS_DRAWN or random.random() > share]
        spec = RouterSpec(**{name: random.choice(AXES[name]) for name in names})
        if makes_sense(spec):
            return spec


def specs() -> st.SearchStrategy[RouterSpec]:
    """Return routers whose fields are drawn independently: mutating a draw would repeat most of them."""
    return st.integers(0, 2**62).map(lambda number: drawn(Random(number)))


def plainest(spec: RouterSpec, fails: Callable[[RouterSpec], bool]) -> RouterSpec:
    """Return a spec that fails too, of which no field can be made plainer.

    Args:
        spec: One that fails.
        fails: Whether a spec fails.
    """
    for each in reversed(fields(spec)):  # compiled modes, which are slow, first
        plainer = replace(spec, **{each.name: each.default})
        if plainer != spec and makes_sense(plainer) and fails(plainer):
            return plainest(plainer, fails)
    return spec
