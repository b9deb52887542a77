"""`python -m vtc` is the `vtc` command."""

from vtc.cli import main

main()
