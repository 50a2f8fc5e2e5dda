"""Measures of an attribute-prediction model and of steered models, and the judges that measure responses."""
