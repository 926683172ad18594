"""Complete Lightning projects that run on one device or on a pipeline without a change."""
