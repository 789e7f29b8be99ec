"""Those that do the work of a scenario: xfm-fast, the official algorithm, and whatever else is installed."""
