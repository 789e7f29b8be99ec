"""Training: typed recipes, the official optimizer, schedules, one visible loop, exact resume."""
