"""Rules: norm."""
