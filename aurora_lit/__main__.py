"""`python -m aurora_lit` is the command `aurora-lit`."""


def run() -> None:
    """Run the command line."""
    # Imported here: a process that multiprocessing spawns imports this file again, and has no use for commands.
    from aurora_lit.cli.main import main

    main(prog_name="aurora-lit")


if __name__ == "__main__":
    run()
