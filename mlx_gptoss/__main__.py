"""`python -m mlx_gptoss` is the `mlx-gptoss` command."""

from mlx_gptoss_cli.main import main

main()
