"""Rules: collective."""
