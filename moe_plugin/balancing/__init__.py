"""Counting the load of each expert and moving the selection bias against it: pure tensor code."""
