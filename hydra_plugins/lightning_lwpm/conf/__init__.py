"""Hydra takes a folder of configurations only from a package."""
