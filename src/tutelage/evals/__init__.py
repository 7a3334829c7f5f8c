"""How good a model is: scores with standard errors."""
