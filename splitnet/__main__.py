"""`python -m splitnet` is the command `splitnet`."""

from splitnet.cli.main import main

main()
