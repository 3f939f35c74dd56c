"""What the processes of a server log: to stderr, with the time, the level, and the process and file that say it.

Warnings and errors, and of this package what is worth a line (INFO), such as what a new draft has brought.

Only the commands that start such processes and the processes that they spawn call it, so a program that uses
`aurora_lit.LLM` keeps its own logging. Leaves out what vLLM's processes log (vllm/).
"""

from __future__ import annotations

import logging
import multiprocessing

_FORMAT = "%(asctime)s %(levelname)s %(processName)s[%(process)d] %(name)s: %(message)s"


def log_to_stderr(process: str | None = None) -> None:
    """Log what this process, and those that it forks, have to tell to stderr; nothing if it logs already.

    process: its name in the log; None: the one that multiprocessing gave it.
    """
    if process is not None:
        multiprocessing.current_process().name = process
    if logging.getLogger().handlers:
        return
    logging.basicConfig(format=_FORMAT)
    (handler,) = logging.getLogger().handlers
    # The level of Lightning's loggers is INFO too.
    handler.addFilter(lambda record: record.levelno >= logging.WARNING or record.name.startswith("aurora_lit."))
    logging.getLogger("aurora_lit").setLevel(logging.INFO)
    # Not above these two: there Lightning has a console, which would repeat it all.
    for name in ("lightning.fabric", "lightning.pytorch"):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False
