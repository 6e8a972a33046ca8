"""`python -m sslfast` is the `sslfast` command, so that torchrun can start it."""

from sslfast.cli import main

if __name__ == "__main__":
    main()
