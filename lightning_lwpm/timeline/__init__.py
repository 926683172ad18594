"""Timelines: what ran when, planned and measured, as pictures and as traces."""
