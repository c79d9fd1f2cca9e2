"""From images and text, in files or shards, to the inputs of a model."""
