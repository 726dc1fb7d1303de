"""The results of a run or a sweep: `summary.json`, `sweep_summary.csv` and tables for the terminal."""

from moe_plugin.apps.report.run_table import balance_table, headline_table, run_report, tensorboard_command
from moe_plugin.apps.report.summary import RunSummary, read_summary, write_summary
from moe_plugin.apps.report.sweep import gather_sweep, sweep_table, write_sweep_summary

__all__ = [
    "RunSummary",
    "balance_table",
    "gather_sweep",
    "headline_table",
    "read_summary",
    "run_report",
    "sweep_table",
    "tensorboard_command",
    "write_summary",
    "write_sweep_summary",
]
