"""How fast a model is, how well it predicts, and how far it is from a reference."""
