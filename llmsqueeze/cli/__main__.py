"""`python -m llmsqueeze.cli`."""

from llmsqueeze.cli.app import main

main()
