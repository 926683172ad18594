"""One stage's share of a step: remote tensors, placeholders and the replay of a step."""
