"""Other programs to be timed against ours, each in a process of its own. Only here: mlx_lm and transformers."""
