"""Train the miniature: its pictures, its parts, its training."""
