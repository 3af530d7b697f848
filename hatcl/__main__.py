"""`python -m hatcl` is the `hatcl` command."""

from .commands import main

if __name__ == "__main__":
    main()
