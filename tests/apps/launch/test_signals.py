"""Tests of noting signals: at once, deferred, ignored, handed on."""

from __future__ import annotations

import signal
from collections.abc import Iterator

import pytest

from moe_plugin.apps.launch.signals import StopSignals


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR2)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


class TestStopSignals:
    @pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1])
    def test_signal_with_nothing_to_save_ends_at_once_with_the_shells_code(
        self, number: signal.Signals
    ) -> None:
        with pytest.raises(SystemExit, match=f"^{128 + number}$"), StopSignals():
            signal.raise_signal(number)

    def test_deferred_signal_is_only_noted(self) -> None:
        with StopSignals() as signals:
            signals.deferred = True
            signal.raise_signal(signal.SIGTERM)
            signal.raise_signal(signal.SIGTERM)  # SLURM's, and the agent's passing it on
            assert signals.name == "SIGTERM"

    def test_second_interrupt_ends_at_once(self) -> None:
        with StopSignals() as signals:
            signals.deferred = True
            signal.raise_signal(signal.SIGINT)
            with pytest.raises(SystemExit, match="130"):
                signal.raise_signal(signal.SIGINT)

    def test_what_the_shell_ignores_stays_ignored(self) -> None:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        with StopSignals() as signals:
            signal.raise_signal(signal.SIGHUP)
        assert signals.received == 0

    def test_launcher_that_handled_the_signal_before_gets_it_afterwards(self) -> None:
        calls: list[int] = []
        signal.signal(signal.SIGUSR2, lambda number, _: calls.append(number))
        with StopSignals() as signals:
            signals.deferred = True
            signal.raise_signal(signal.SIGUSR2)
            assert calls == []
        assert calls == [signal.SIGUSR2]

    def test_handlers_are_given_back(self) -> None:
        before = signal.getsignal(signal.SIGTERM)
        with StopSignals():
            pass
        assert signal.getsignal(signal.SIGTERM) is before
