"""`experts="fused"`: computing a host model's stacked experts by our kernels."""
