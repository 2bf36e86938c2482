"""The bundled model: files only. See examples/tools/train_nano.py, which made them."""
