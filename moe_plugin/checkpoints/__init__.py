"""Checkpoints that are whole or not there, and that are read without running what they hold."""
