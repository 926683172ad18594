"""What Lightning expects around the pipeline: data, logging, metrics, gradients, precision."""
