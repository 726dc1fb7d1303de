"""Finds cases and runs one in this process: `python -m benchmarks.case NAME ROWS_FILE [OPTION=VALUE ...]`."""

from __future__ import annotations

import inspect
import json
import logging
import pkgutil
import random
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from benchmarks import cases
from benchmarks.row import Row


def case_names() -> list[str]:
    """Return the names of all cases."""
    return [module.name for module in pkgutil.iter_modules(cases.__path__)]


def summary_of(name: str) -> str:
    """Return in a line what a case measures, and its options with their defaults."""
    module = import_module(f"{cases.__name__}.{name}")
    options = ", ".join(f"{key}={value}" for key, value in options_of(name).items())
    return f"{(module.__doc__ or '').splitlines()[0]}" + (f"  [{options}]" if options else "")


def options_of(name: str) -> dict[str, Any]:
    """Return the options of a case, with their defaults."""
    parameters = inspect.signature(_function(name)).parameters.values()
    return {parameter.name: parameter.default for parameter in parameters}


def read_options(name: str, words: Mapping[str, str]) -> dict[str, Any]:
    """Return the given options that a case has, in the types of their defaults."""
    defaults = options_of(name)
    return {key: type(defaults[key])(value) for key, value in words.items() if key in defaults}


def run_here(name: str, words: Mapping[str, str]) -> Iterator[Row]:
    """Return the rows of a case."""
    random.seed(0)
    torch.manual_seed(0)
    return iter(_function(name)(**read_options(name, words)))


def main(words: Sequence[str]) -> None:
    """Write a JSON line per row as soon as it is measured."""
    name, target, threads, *options = words
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(int(threads))
    with Path(target).open("w", buffering=1) as file:
        for row in run_here(name, dict(word.split("=", 1) for word in options)):
            file.write(json.dumps(asdict(row)) + "\n")


def _function(name: str) -> Callable[..., Iterator[Row]]:
    return import_module(f"{cases.__name__}.{name}").rows


if __name__ == "__main__":
    main(sys.argv[1:])
