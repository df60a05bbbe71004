"""`python -m hgrn2` is the command `hgrn2`."""

import sys

import hgrn2_command

if __name__ == "__main__":
    sys.exit(hgrn2_command.main())
