"""What a router may rank experts by instead of its scores: baselines that need no balancing, or balance at once."""

from moe_plugin.routing.rankings.random import Random
from moe_plugin.routing.rankings.ranking import Ranking
from moe_plugin.routing.rankings.sinkhorn import Sinkhorn
from moe_plugin.routing.rankings.token_hash import TokenHash, tell_tokens_

__all__ = ["Random", "Ranking", "Sinkhorn", "TokenHash", "tell_tokens_"]
