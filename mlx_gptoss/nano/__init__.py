"""The bundled model: files only. See examples/train_nano.py, which made them."""
