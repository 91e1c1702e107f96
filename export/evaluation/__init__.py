"""What pruning costs in answers: questions with known answers, put to the desktop model and to bundles."""
