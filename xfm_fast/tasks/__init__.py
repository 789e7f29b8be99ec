"""The tasks that X-FM is fine-tuned for: each task joins a head, a loss, inference and its metric."""
