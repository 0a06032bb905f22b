"""`python -m weights_conversion`, whose code is with the other commands."""

from hooked_hybrid.commands.convert import main

if __name__ == "__main__":
    raise SystemExit(main())
