"""The command `python -m nanovllm`."""

import sys

from nanovllm.entrypoints.command_line import main

if __name__ == "__main__":
    sys.exit(main())
