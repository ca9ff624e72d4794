"""`python -m mmdit_probe`: the command line, for places where the script is not on the path."""

from mmdit_probe.cli.app import main

main()
