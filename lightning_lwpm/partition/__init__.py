"""What goes where: the costs of layers, and their merging into stages."""
