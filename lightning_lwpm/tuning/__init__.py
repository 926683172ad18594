"""Measures what a step costs, chooses from it, and compares what was expected with what came."""
