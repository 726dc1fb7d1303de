"""Running a module on tensors without data, and following what it ranks."""
