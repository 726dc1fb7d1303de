"""The parts of `LoadMonitor`."""
