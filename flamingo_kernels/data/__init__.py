"""Images and text to model inputs."""
