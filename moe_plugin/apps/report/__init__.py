"""The results of a run or a sweep: `summary.json`, `sweep_summary.csv` and tables for the terminal."""
