"""`python -m hatcl` is the `hatcl` command."""

from .commands.main import main

if __name__ == "__main__":
    main()
