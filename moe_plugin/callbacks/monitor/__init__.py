"""What `LoadMonitor` is made of."""
