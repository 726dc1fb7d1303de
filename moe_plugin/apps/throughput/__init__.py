"""How fast a trained model reads: `moe-eval throughput=true`."""
