"""The data modules of the examples: both ship with Python packages, nothing is downloaded."""
