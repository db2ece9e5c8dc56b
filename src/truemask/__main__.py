"""`python -m truemask` is the command `truemask`."""

from truemask.cli.app import main

if __name__ == "__main__":
    main()
