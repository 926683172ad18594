"""Checkpoints: merged and sharded, written whole or not at all, read by any number of stages."""
