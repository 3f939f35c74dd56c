"""Measurements of speed and acceptance on real prompts."""
