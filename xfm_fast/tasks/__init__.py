"""Fine-tuning tasks: head, loss, inference and metric."""
