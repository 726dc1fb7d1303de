"""The parts of a run: a file each, whose function `lines` says what it measures."""
