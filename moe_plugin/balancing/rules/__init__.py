"""Update rules: how a bias follows the load. One file per rule."""

from moe_plugin.balancing.rules.adaptive import Adaptive
from moe_plugin.balancing.rules.load import Load
from moe_plugin.balancing.rules.momentum import Momentum
from moe_plugin.balancing.rules.multiplicative import Multiplicative
from moe_plugin.balancing.rules.pid import PID
from moe_plugin.balancing.rules.primal_dual import PrimalDual
from moe_plugin.balancing.rules.proportional import Proportional
from moe_plugin.balancing.rules.quantile import Quantile
from moe_plugin.balancing.rules.rule import Memory, Rule
from moe_plugin.balancing.rules.sign import Sign

# Proportional first: a command line that gives only what several rules have means the default one.
AnyRule = Proportional | Sign | Momentum | Multiplicative | PID | PrimalDual | Quantile | Adaptive

__all__ = [
    "PID",
    "Adaptive",
    "AnyRule",
    "Load",
    "Memory",
    "Momentum",
    "Multiplicative",
    "PrimalDual",
    "Proportional",
    "Quantile",
    "Rule",
    "Sign",
]
