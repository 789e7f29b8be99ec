"""The `model.py` of models on Triton's Python backend; a repository holds copies, which import the rest from here."""
