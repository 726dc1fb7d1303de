"""Files that somebody else made, read as data: bounded, checked before anything in them is used, and safe to print."""
