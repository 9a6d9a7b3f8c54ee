"""The checkpoints `embedded-dense` and `embedded`: their weights, and how they were trained on drawings (`checkpoints.world`)."""
