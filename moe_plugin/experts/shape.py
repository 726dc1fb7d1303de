"""The sizes of a layer of experts, as in `conf/experts/`."""

from __future__ import annotations

from dataclasses import dataclass

from moe_plugin.errors import ConfigError
from moe_plugin.number_checks import check_integer, check_positive_integers


@dataclass(frozen=True)
class ExpertShape:
    """How many experts a layer has, and how large they are.

    Attributes:
        num_experts: Routed experts.
        top_k: Routed experts per token.
        hidden_dim: Hidden width of each expert, routed or shared.
        num_shared: Experts that every token passes through; built as one with `num_shared` times the width.
    """

    num_experts: int
    top_k: int
    hidden_dim: int
    num_shared: int = 0

    def __post_init__(self) -> None:
        """Check the numbers.

        Raises:
            ConfigError: A number is out of range.
        """
        check_positive_integers(num_experts=self.num_experts, top_k=self.top_k, hidden_dim=self.hidden_dim)
        check_integer("num_shared", self.num_shared, least=0)
        if self.top_k > self.num_experts:
            raise ConfigError("top_k", f"must be <= num_experts ({self.num_experts})", self.top_k)
