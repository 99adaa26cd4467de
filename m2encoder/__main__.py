"""`python -m m2encoder` is `m2enc`, for launchers such as torchrun that start a module.

Not a place for logic: see m2encoder.cli.
"""

from m2encoder.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
