"""Fine-tuning, evaluation and prediction of the paper's tasks."""
