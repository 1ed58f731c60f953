"""How codes are found: every method is a WeightQuantizer."""
