"""Rules: pointwise."""
