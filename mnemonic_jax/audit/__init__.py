"""What a forgotten model still knows."""
