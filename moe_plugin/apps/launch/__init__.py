"""The application's own pieces: compose, check, build, run in one or many processes, sweep."""
