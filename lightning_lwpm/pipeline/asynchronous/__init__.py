"""Training without flushes: how late gradients come, and what makes up for it."""
