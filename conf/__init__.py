"""The config groups; installed as ``moe_plugin.conf``, so ``pkg://moe_plugin.conf`` is a Hydra search path."""
