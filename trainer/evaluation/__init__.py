"""Samplers, who takes part in samples of several students, and distances between what is drawn and real data."""
