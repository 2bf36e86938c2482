"""Files that may come from anywhere, read and checked before other code sees them."""
