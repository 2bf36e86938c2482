"""From a model's name to a load plan: find it, choose a backend, plan its memory, on one machine or several."""
