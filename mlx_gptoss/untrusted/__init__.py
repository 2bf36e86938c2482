"""What may come from anywhere: files, read and checked before other code sees them; work that must be able to end."""
