"""`python -m aurora_lit` is the command `aurora-lit`."""

import io
import signal
import sys


def run() -> None:
    """Run the command line; SIGTERM ends it as Ctrl-C would, until a command handles that itself."""
    # Imported here: a process that multiprocessing spawns imports this file again, and has no use for commands.
    from aurora_lit.ipc.process_lifetime import raise_exit
    from aurora_lit.machine import spin_briefly

    # Process 1 of a container would ignore it otherwise: for that one the system has no default.
    signal.signal(signal.SIGTERM, raise_exit)
    spin_briefly()
    if isinstance(sys.stdout, io.TextIOWrapper):  # not all of an answer can be written in Latin-1
        sys.stdout.reconfigure(errors="replace")
    from aurora_lit.cli.main import main

    main(prog_name="aurora-lit")


if __name__ == "__main__":
    run()
