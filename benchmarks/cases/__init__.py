"""One file per case, each with a function `rows` whose keyword arguments are its options."""
