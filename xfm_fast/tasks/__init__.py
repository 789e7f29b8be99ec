"""What people do with X-FM: each task joins a head, a loss, inference and its metric."""
