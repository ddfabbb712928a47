"""``python -m optimizers.ablation`` is the command ``soaa``."""

from optimizers.ablation.cli import main

main()
