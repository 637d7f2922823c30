"""`python -m llmsqueeze`, for launchers that start a module: `torchrun -m llmsqueeze quantize ...`."""

from llmsqueeze.cli.app import main

main()
