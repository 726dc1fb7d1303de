"""Balancing rules on made-up scores, without a model: the fast way to choose a rule and its rate."""
