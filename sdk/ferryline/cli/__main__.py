"""`python -m ferryline.cli`: the same as the installed `ferryline` program."""

from ferryline.cli import main

main()
