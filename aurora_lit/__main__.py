"""`python -m aurora_lit` is the command `aurora-lit`."""

from aurora_lit.cli.main import main

if __name__ == "__main__":
    main(prog_name="aurora-lit")
