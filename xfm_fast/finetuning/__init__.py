"""Fine-tuning, evaluation and prediction: the tasks of the paper, each from its files to its metric."""
