from __future__ import annotations

import jax
import pytest


class Compiled:
    """Counts XLA compilations by the name of the jitted function."""

    def __init__(self) -> None:
        self.names: list[str] = []
        jax.monitoring.register_event_duration_secs_listener(self._hear)

    def _hear(self, event: str, duration: float, **more: object) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            self.names.append(str(more.get("fun_name")))

    def count(self, function: str) -> int:
        return self.names.count(f"jit({function})")


@pytest.fixture(scope="session", autouse=True)
def compiled() -> Compiled:
    return Compiled()
