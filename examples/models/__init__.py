"""The LightningModules of the examples: ordinary ones, which know nothing of pipelines."""
