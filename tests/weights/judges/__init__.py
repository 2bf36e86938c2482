"""One module for each tool whose checkpoints judge_tools.py makes, opens and compares."""
