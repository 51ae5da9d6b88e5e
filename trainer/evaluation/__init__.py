"""Samplers, and distances between what they draw and real data."""
