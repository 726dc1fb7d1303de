"""Update rules: how a bias follows the load. One file per rule."""

from moe_plugin.balancing.rules.proportional import Proportional
from moe_plugin.balancing.rules.rule import Rule
from moe_plugin.balancing.rules.sign import Sign

__all__ = ["Proportional", "Rule", "Sign"]
