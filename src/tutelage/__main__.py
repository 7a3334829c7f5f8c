"""`python -m tutelage`, which torchrun needs."""

from tutelage.cli.main import main

main()
