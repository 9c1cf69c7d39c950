"""How good a pipeline is on objects it has not seen, beside honest baselines."""
