"""How Prefect should behave for someone who has set nothing up. Whatever the user has set stays.

Prefect reads the environment when it is first imported, which is why importing this package comes before that.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager

DEFAULTS = {
    "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "120",  # the first start makes a database: 15 s and more
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "DO_NOT_TRACK": "1",
    "PREFECT_LOGGING_LEVEL": "WARNING",
    # A request to a server that is away is tried again after 2, 4 and 8 s. Prefect's own five tries take a minute, for
    # each of the requests and events that have gathered: a flow then ends minutes after its work. Whether the server
    # comes back is waited for once, at the end (`flows.server.wait_until_back`).
    "PREFECT_CLIENT_MAX_RETRIES": "3",
}

# Whether the level of Prefect's logs on the terminal is ours to choose.
LEVEL_IS_OURS = "PREFECT_LOGGING_LEVEL" not in os.environ

for _name, _value in DEFAULTS.items():
    os.environ.setdefault(_name, _value)


@contextmanager
def one_sentence_errors() -> Iterator[None]:
    """Keeps Prefect's account of a failed run, with its traceback, off the terminal: the caller tells it in a sentence.

    The server gets it all the same. Does nothing when the user has chosen a logging level.
    """
    if not LEVEL_IS_OURS:
        yield
        return
    handlers = list(logging.getLogger().handlers)
    for handler in handlers:
        handler.addFilter(_no_run_logs)
    try:
        yield
    finally:
        for handler in handlers:
            handler.removeFilter(_no_run_logs)


def _no_run_logs(record: logging.LogRecord) -> bool:
    return not record.name.startswith(("prefect.flow_runs", "prefect.task_runs", "prefect.engine"))
