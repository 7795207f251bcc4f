"""A stop by the user, at a step that the test chooses."""

import signal

from train.step import Step


def stop_at(step: int, monkeypatch) -> None:
    """Ctrl-C arrives during this step of the process's next run."""
    calls = 0
    original = Step.__call__

    def call(self, batch, *where):
        nonlocal calls
        calls += 1
        if calls == step:
            signal.raise_signal(signal.SIGINT)
        original(self, batch, *where)

    monkeypatch.setattr(Step, "__call__", call)
