"""What `moe-eval` is made of: a stored run as it is evaluated, and the file of its measures."""
