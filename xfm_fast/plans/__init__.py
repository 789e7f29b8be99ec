"""Plans: transformer layers in CPU inference as one call of compiled code."""
