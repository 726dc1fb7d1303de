"""Auxiliary-loss-free load balancing for mixture-of-experts training."""
