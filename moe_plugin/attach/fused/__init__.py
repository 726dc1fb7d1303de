"""`experts="fused"`: computing a host model's own stacked experts with ours."""
