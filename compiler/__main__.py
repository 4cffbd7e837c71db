"""`python -m chunkc` is the command `chunkc`."""

from __future__ import annotations

from chunkc.cli import main

if __name__ == "__main__":
    main()
