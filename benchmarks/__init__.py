"""Measurements by hand: `python -m benchmarks speed|nst|quality`. Each prints a table and writes JSON."""
