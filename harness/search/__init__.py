"""Searches that find a method's strategy on a few calibration samples, and the recipe file they end in."""
