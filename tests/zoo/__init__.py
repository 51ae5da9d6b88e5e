"""Tiny random-weight configurations of every diffusers transformer, and what their tangents should be."""
