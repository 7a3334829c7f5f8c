"""`python -m tutelage`, which torchrun needs."""

from tutelage.cli import main

main()
