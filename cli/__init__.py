"""The `mlx-gptoss` command. Each command is one file; main.py names them and imports only the one that is used."""
