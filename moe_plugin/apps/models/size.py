"""What a model costs: parameters, operations and memory, counted without running it.

Works on the meta device: `with torch.device("meta"): model = ...`, then `measure(model)`.
"""

from __future__ import annotations

from dataclasses import dataclass
from statistics import fmean

from rich.console import Console
from rich.table import Table
from torch import nn

from moe_plugin.apps.models.flops import attention_flops, matmul_flops
from moe_plugin.attach.discovery.routed_experts import find_routed_experts
from moe_plugin.number_checks import check_positive_integers
from moe_plugin.types import AllocatesExperts

_ADAM_BYTES = 8  # Two moments in fp32.
_GIB = 2**30


@dataclass(frozen=True)
class StrategyMemory:
    """Bytes per device that training holds from step to step under one strategy; activations come on top.

    Attributes:
        strategy: Name of the strategy.
        parameters: Parameters, in their own dtype.
        gradients: Gradients in the parameters' dtype, and what the strategy buffers of them.
        optimizer: Both of Adam's moments, in fp32.
    """

    strategy: str
    parameters: int
    gradients: int
    optimizer: int

    @property
    def total(self) -> int:
        """Sum of the parts."""
        return self.parameters + self.gradients + self.optimizer


@dataclass(frozen=True)
class ModelSize:
    """What a model costs.

    Attributes:
        total_parameters: All parameters, shared ones once.
        active_parameters: Those that take part for one token: of each layer's routed experts top_k of num_experts.
            Embedding and output projection count in full, as in the published "37B active" of DeepSeek-V3.
        embedding_parameters: Parameters of the token embeddings, contained in both.
        forward_flops_per_token: Operations of one forward, attention included.
        attention_flops_per_token: Of these, attention scores and weighted sums.
        expert_flops: Operations of one forward of a token through one routed expert in every layer that has some.
        experts_per_token: Routed experts of a token, the mean over those layers; None without any.
        context_length: Sequence length of the attention part; causal.
        memory: Bytes by strategy.
    """

    total_parameters: int
    active_parameters: int
    embedding_parameters: int
    forward_flops_per_token: int
    attention_flops_per_token: int
    expert_flops: int
    experts_per_token: float | None
    context_length: int
    memory: tuple[StrategyMemory, ...]

    @property
    def training_flops_per_token(self) -> int:
        """Operations of forward and backward, which costs twice the forward; without recomputation."""
        return 3 * self.forward_flops_per_token

    def active_flops(self, experts_per_token: float) -> float:
        """Return operations of one forward of a token that uses this many experts in every layer."""
        return self.forward_flops_per_token + self.expert_flops * (
            experts_per_token - (self.experts_per_token or 0)
        )


def measure(model: nn.Module, *, context_length: int | None = None, num_devices: int = 8) -> ModelSize:
    """Count what a model costs.

    Args:
        model: Any model, on any device including meta. Nothing is run or allocated.
        context_length: Sequence length for the attention operations; by default the model's
            `context_length`, or else 4096.
        num_devices: Devices that `fsdp` shards over.

    Raises:
        ConfigError: A number is not positive, or routed experts have no top_k next to them.
    """
    length = int(context_length or getattr(model, "context_length", 4096))
    check_positive_integers(context_length=length, num_devices=num_devices)
    routed = find_routed_experts(model)
    total = sum(parameter.numel() for parameter in model.parameters())
    attention = attention_flops(model, length)
    return ModelSize(
        total_parameters=total,
        active_parameters=total - sum(e.num_parameters - e.num_active_parameters for e in routed),
        embedding_parameters=sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Embedding)),
        forward_flops_per_token=matmul_flops(model, routed) + attention,
        attention_flops_per_token=attention,
        expert_flops=sum(2 * e.num_parameters // e.num_experts for e in routed),
        experts_per_token=fmean(e.top_k for e in routed) if routed else None,
        context_length=length,
        memory=_memory_by_strategy(model, num_devices),
    )


def fixed_experts_per_token(model: nn.Module) -> float | None:
    """Return the routed experts of a token, averaged over layers; None if tokens use different numbers, or none."""
    routed = find_routed_experts(model)
    varies = any(isinstance(module, AllocatesExperts) for module in model.modules())
    return fmean(experts.top_k for experts in routed) if routed and not varies else None


def size_table(size: ModelSize) -> Table:
    """Return a table of all numbers, for a rich console."""
    table = Table(title="Model size", show_header=False)
    table.add_column(style="bold")
    table.add_column(justify="right")
    table.add_column(style="dim")
    table.add_row("Parameters, total", _count(size.total_parameters), f"{size.total_parameters:,}")
    table.add_row(
        "Parameters, active", _count(size.active_parameters), "per token; embedding and output included"
    )
    table.add_row("Parameters, embedding", _count(size.embedding_parameters), "looked up, no operations")
    attention = (
        f"{_count(size.attention_flops_per_token)} in causal attention over {size.context_length} tokens"
    )
    table.add_row("FLOPs per token, forward", _count(size.forward_flops_per_token), attention)
    table.add_row("FLOPs per token, training", _count(size.training_flops_per_token), "3 x forward")
    table.add_section()
    for memory in size.memory:
        parts = (
            (memory.parameters, "parameters"),
            (memory.gradients, "gradients"),
            (memory.optimizer, "Adam"),
        )
        note = " + ".join(f"{_gib(part)} {name}" for part, name in parts)
        table.add_row(f"Memory per device, {memory.strategy}", _gib(memory.total), note)
    table.caption = (
        "Memory: parameters and gradients in the parameters' dtype, Adam in fp32, DDP with its gradient buckets; "
        "without activations and, under fsdp, the layer that is gathered."
    )
    return table


def print_size_table(size: ModelSize) -> None:
    """Print `size_table` on the terminal."""
    Console().print(size_table(size))


def _memory_by_strategy(model: nn.Module, num_devices: int) -> tuple[StrategyMemory, ...]:
    parameters = sum(p.numel() * p.element_size() for p in model.parameters())
    trained = [p for p in model.parameters() if p.requires_grad]
    gradients = sum(p.numel() * p.element_size() for p in trained)
    optimizer = sum(p.numel() for p in trained) * _ADAM_BYTES
    shard = [-(-size // num_devices) for size in (parameters, gradients, optimizer)]
    return (
        StrategyMemory("single", parameters, gradients, optimizer),
        StrategyMemory("ddp", parameters, 2 * gradients, optimizer),
        StrategyMemory(f"fsdp over {num_devices}", *shard),
    )


def _count(number: int) -> str:
    for factor, unit in ((10**12, "T"), (10**9, "B"), (10**6, "M"), (10**3, "k")):
        if number >= factor:
            return f"{number / factor:.2f} {unit}"
    return str(number)


def _gib(size: int) -> str:
    return f"{size / _GIB:,.2f} GiB"
